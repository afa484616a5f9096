"""What is known of the call that a model runs in, also when such a call was cut short."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from peft_many.routing.calls import running
from peft_many.routing.watching import watching_calls
from tests import tiny
from tests.files import making

TOKENS = torch.tensor([[1, 5, 9]])


def current_owner() -> nn.Module | None:
    call = running.get()
    return None if call is None else call.owner


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("within", "innermost"), [("lm_head", ""), ("model.language_model", "model")])
def test_an_interrupted_call_is_forgotten_by_the_next(within: str, innermost: str) -> None:
    """Ctrl-C runs no hook that would end the call."""
    model = tiny.build("llava")
    with watching_calls(model):
        handle = model.get_submodule(within).register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=TOKENS)
        handle.remove()
        assert current_owner() is model.get_submodule(innermost)
        model(input_ids=TOKENS)
        assert running.get() is None


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_an_interrupted_call_does_not_keep_its_model(family: str) -> None:
    model = making.merge(family, 2, gate_lora=True)
    inputs = next(making.task_batches(model.get_base_model(), family, 0))
    model.get_base_model().lm_head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    kept = weakref.ref(model.get_base_model())
    assert current_owner() is kept()
    del model
    gc.collect()
    assert kept() is None
    making.shared_merge("llava")(input_ids=TOKENS)
    assert running.get() is None


def test_calls_are_nested_as_they_run() -> None:
    model, seen = tiny.build("llava"), []
    with watching_calls(model):
        model.lm_head.register_forward_hook(lambda *_: seen.append(current_owner()))
        model.model.language_model.register_forward_hook(lambda *_: seen.append(current_owner()))
        model(input_ids=TOKENS)
        assert seen == [model.model, model]
        model.generate(input_ids=TOKENS, max_new_tokens=2)
        assert seen == [model.model, model] * 3
        assert running.get() is None


def test_another_model_may_be_called_inside() -> None:
    """Unlike one that was interrupted, the outer call goes on."""
    model, other, seen = tiny.build("llava"), tiny.build("qwen2_vl"), []

    def ask_the_other(*_: Any) -> None:
        seen.append(running.get())
        other(input_ids=TOKENS)
        seen.append(running.get())

    def look(*_: Any) -> None:
        call = running.get()
        seen.append(call)
        assert call is not None
        assert call.of_batch is not None
        assert call.of_batch.owner is other

    with watching_calls(model), watching_calls(other):
        model.model.language_model.register_forward_hook(ask_the_other)
        other.model.language_model.register_forward_hook(look)
        for run in (lambda: model(input_ids=TOKENS), lambda: model.generate(input_ids=TOKENS, max_new_tokens=1)):
            seen.clear()
            run()
            before, inside, after = seen
            assert before.owner is model.model
            assert before is after
            assert before.of_batch.owner is model
            assert inside.owner is other.model
            assert running.get() is None
