"""Quantised bases: the layers are dispatched as LoRA's are, measured and merged; a quantised projector is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from peft_many import MAnyConfig, collect_statistics, merge_adapter_sequence
from tests import tiny

PROJECTOR = "model.multi_modal_projector"


@pytest.fixture
def load(tmp_path):
    tiny.build("llava").save_pretrained(tmp_path / "base")

    def load(skip=(PROJECTOR, "lm_head")):
        quantisation = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip))
        return LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", quantization_config=quantisation)

    return load


def q_proj(model):
    return model.base_model.model.model.language_model.layers[0].self_attn.q_proj


def test_quantised_layers_train_are_measured_and_merge(load, tmp_path):
    as_lora = get_peft_model(load(), LoraConfig(r=2, target_modules=["q_proj"]))
    model = get_peft_model(load(), MAnyConfig(r=2, init_lora_weights=False))
    assert type(q_proj(model)) is type(q_proj(as_lora))
    assert "bnb" in type(q_proj(model)).__module__
    batch = tiny.batch(model, "llava", [[tiny.random_image("llava", 0)], [tiny.random_image("llava", 1)]])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert q_proj(model).lora_A["default"].weight.grad.abs().sum() > 0
    model.eval()
    collect_statistics(model, [batch], progress=False)
    model.save_pretrained(tmp_path / "adapter")
    merged = merge_adapter_sequence(load(), [tmp_path / "adapter"], progress=False)
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, atol=1e-3, rtol=1e-3)


def test_a_quantised_projector_is_refused_with_a_way_out(load):
    base = load(skip=["lm_head"])
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=rf"'{PROJECTOR}' is quantised.*llm_int8_skip_modules"):
        get_peft_model(base, MAnyConfig(r=2))
    assert [name for name, _ in base.named_modules()] == names
    get_peft_model(base, MAnyConfig(r=2, projector_modules=[]))
