"""What the plugin does to PEFT: the entries it makes, and the one wrapped method, with a test that says why."""

import copy

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from peft_many import MAnyConfig, MAnyModel, collect_statistics
from peft_many.plugin.registration import register
from tests import tiny


def test_the_type_is_registered_and_peft_s_enum_is_untouched():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["MANY"] is MAnyConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["MANY"] is MAnyModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["MANY"] == "lora_"
    assert "MANY" not in PeftType.__members__


def test_registering_twice_wraps_once():
    before = PeftConfig.from_pretrained.__func__
    register()
    assert PeftConfig.from_pretrained.__func__ is before
    assert not hasattr(before.__wrapped__, "__wrapped__")


def adapter(folder, config=None):
    base = tiny.build_text("llama")
    base.save_pretrained(folder / "base")
    base = type(base).from_pretrained(folder / "base")
    model = get_peft_model(base, config or MAnyConfig(r=2))
    collect_statistics(model, [{"input_ids": torch.arange(8).view(2, 4) + 5}], progress=False)
    model.save_pretrained(folder / "adapter")
    return type(base)


@pytest.mark.parametrize("config", [MAnyConfig(r=2), LoraConfig(r=2, target_modules=["q_proj"])])
def test_statistics_follow_every_way_of_loading(config, tmp_path):
    model_class = adapter(tmp_path, copy.deepcopy(config))
    path = tmp_path / "adapter"

    def base():
        return model_class.from_pretrained(tmp_path / "base")

    transformers_model = base()
    transformers_model.load_adapter(str(path))
    loaded = {
        "PeftModel": PeftModel.from_pretrained(base(), path).peft_config["default"],
        "AutoPeftModel": AutoPeftModel.from_pretrained(path).peft_config["default"],
        "transformers": transformers_model.peft_config["default"],
        "base class": PeftConfig.from_pretrained(path),
    }
    for way, found in loaded.items():
        assert found.statistics.tasks[0].samples == 2, way
        found.save_pretrained(tmp_path / way)
        assert (tmp_path / way / "adapter_statistics.safetensors").is_file(), way


def test_upstream_still_asks_the_base_class_so_the_wrapping_is_needed(tmp_path, monkeypatch):
    """If this fails, transformers asks the config class of the adapter's type: make the wrapping an override there."""
    model_class = adapter(tmp_path)
    asked = []
    original = PeftConfig.from_pretrained.__func__

    def from_pretrained(cls, *args, **kwargs):
        asked.append(cls)
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(PeftConfig, "from_pretrained", classmethod(from_pretrained))
    model_class.from_pretrained(tmp_path / "base").load_adapter(str(tmp_path / "adapter"))
    assert asked == [PeftConfig]
