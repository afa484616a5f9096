"""What the plugin does to PEFT: the entries it makes, and the two wrapped methods, with tests that say why."""

import copy
import dataclasses
import pickle

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftWarning

from peft_many import MAnyConfig, MAnyModel, collect_statistics
from peft_many.hub.sources import RemoteStatistics
from peft_many.tuner.registration import register
from tests import tiny


def test_the_type_is_registered_and_peft_s_enum_is_untouched():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["MANY"] is MAnyConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["MANY"] is MAnyModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["MANY"] == "lora_"
    assert "MANY" not in PeftType.__members__


def test_registering_twice_wraps_once():
    loading, saving = PeftConfig.from_pretrained.__func__, PeftConfig.save_pretrained
    register()
    assert PeftConfig.from_pretrained.__func__ is loading
    assert PeftConfig.save_pretrained is saving
    assert not any(hasattr(method.__wrapped__, "__wrapped__") for method in (loading, saving))


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


def test_damaged_statistics_do_not_stop_inference(tmp_path):
    model_class = adapter(tmp_path)
    path = tmp_path / "adapter" / "adapter_statistics.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(PeftWarning, match="without its statistics.*adapter_statistics.safetensors"):
        model = PeftModel.from_pretrained(model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert model.peft_config["default"].statistics is None


def test_measured_configs_can_be_pickled_and_copied(tmp_path):
    adapter(tmp_path, LoraConfig(r=2, target_modules=["q_proj"]))
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        twin.save_pretrained(tmp_path / "twin")
        assert (tmp_path / "twin" / "adapter_statistics.safetensors").is_file()


def test_saving_and_copying_a_config_copies_no_statistics(tmp_path):
    adapter(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert copy.deepcopy(config).statistics is config.statistics
    assert dataclasses.asdict(config)["statistics"] is config.statistics
    assert "statistics" not in config.to_dict()


def test_no_token_is_printed_logged_or_pickled():
    remote = RemoteStatistics("me/adapter", "adapter_statistics.safetensors", token="hf_SECRET")
    config = MAnyConfig(statistics=remote)
    assert "hf_SECRET" not in f"{config!r} {remote!r} {dataclasses.asdict(config)}"
    assert b"hf_SECRET" not in pickle.dumps(config)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_changed_copy_of_a_measured_config_is_saved_as_it_is(tmp_path, duplicate):
    adapter(tmp_path, LoraConfig(r=2, target_modules=["q_proj"]))
    config = duplicate(PeftConfig.from_pretrained(tmp_path / "adapter"))
    config.r = 8
    config.save_pretrained(tmp_path / "copy")
    found = PeftConfig.from_pretrained(tmp_path / "copy")
    assert found.r == 8
    assert found.statistics.tasks[0].samples == 2
