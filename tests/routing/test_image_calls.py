"""What is known of the call that a model runs in, also when such a call was cut short."""

from typing import Any

import pytest
import torch

from peft_many.families.calls import current_model_call
from peft_many.routing.image_calls import watching_image_calls
from tests import tiny

TOKENS = torch.tensor([[1, 5, 9]])


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("following", ["llava", "qwen2_vl"])
def test_an_interrupted_call_is_forgotten_by_the_next(following: str) -> None:
    """Ctrl-C runs no hook that would end the call."""
    model = tiny.build("llava")
    other = model if following == "llava" else tiny.build(following)
    with watching_image_calls(model), watching_image_calls(other):
        handle = model.lm_head.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=TOKENS)
        handle.remove()
        assert current_model_call()[0] is model
        other(input_ids=TOKENS)
        assert current_model_call() == (None, {})


def test_calls_are_nested_as_they_run() -> None:
    model, seen = tiny.build("llava"), []
    with watching_image_calls(model):
        model.lm_head.register_forward_hook(lambda *_: seen.append(current_model_call()[0]))
        model.model.language_model.register_forward_hook(lambda *_: seen.append(current_model_call()[0]))
        model(input_ids=TOKENS)
        assert seen == [model.model, model]
        model.generate(input_ids=TOKENS, max_new_tokens=2)
        assert seen == [model.model, model] * 3
        assert current_model_call() == (None, {})
