"""What adapters may be called, and rows of one batch for several of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import PeftWarning

from peft_many import MAnyConfig
from tests import tiny
from tests.adapters import base, state_digest


@pytest.mark.parametrize("name", ["v1.5", "."])
@pytest.mark.parametrize("family", ["llava", "llama"])
def test_impossible_names_leave_the_model_as_it_was(family, name):
    model = base(family)
    before = state_digest(model)
    with pytest.raises(ValueError, match=r"must be a name without a dot, such as 'v1_5'"):
        get_peft_model(model, MAnyConfig(r=2), adapter_name=name)
    assert state_digest(model) == before
    wrapped = get_peft_model(model, MAnyConfig(r=2))
    with pytest.raises(ValueError, match="without a dot"):
        wrapped.add_adapter("v1.5", MAnyConfig(r=2))
    assert list(wrapped.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["0", "weight", "q_proj", "lora_A", "base_model", "experts", "prototypes"])
def test_names_with_which_saving_would_lose_tensors_are_a_warning(name):
    with pytest.warns(PeftWarning, match=f"should not be '{name}'"):
        get_peft_model(base("llava"), MAnyConfig(r=2), adapter_name=name)


@pytest.mark.parametrize("name", ["default", "clevr", "v1_5", "a b", "me/x", "00", "weights"])
def test_other_names_are_not(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model = get_peft_model(base("llama"), MAnyConfig(r=2), adapter_name=name)
        model.add_adapter("second", MAnyConfig(r=2))
        model.save_pretrained(tmp_path, selected_adapters=["second"])
        PeftModel.from_pretrained(base("llama"), tmp_path / "second", adapter_name=name)


def test_rows_of_one_batch_cannot_go_through_several_projectors():
    """And the error leaves nothing behind, as it would by PEFT's own hooks."""
    model = get_peft_model(base("llava"), MAnyConfig(r=2)).eval()
    model.add_adapter("other", MAnyConfig(r=2))
    batch = tiny.batch(model, "llava", [[tiny.random_image("llava", i)] for i in range(2)])
    text = {"input_ids": torch.tensor([[5, 6, 7], [7, 8, 9]])}
    with torch.no_grad():
        before = model(**batch).logits
        with pytest.raises(ValueError, match=r"`adapter_names` cannot be passed together with images.*`set_adapter`"):
            model(**batch, adapter_names=["default", "other"])
        assert torch.equal(model(**batch).logits, before)
        mixed = model(**text, adapter_names=["default", "other"]).logits
        assert torch.allclose(mixed, model(**text).logits, atol=1e-5)  # nothing is trained


def test_a_compiled_base_model_is_adapted_as_it_is_inside():
    model = base("llava")
    with pytest.warns(PeftWarning, match="compile the PEFT model"):
        wrapped = get_peft_model(torch.compile(model, backend="eager"), MAnyConfig(r=2))
    assert wrapped.get_base_model() is model
    assert wrapped.peft_config["default"].projector_modules == ["model.multi_modal_projector"]


def test_a_task_is_called_by_a_string():
    with pytest.raises(TypeError, match="`task_name` must be a string, but it is 5"):
        MAnyConfig(task_name=5)
