"""`examples/lmms_eval_many.py` beside a stand-in for lmms-eval, which is not among the tests' needs."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from peft_many import MAnyConfig
from tests.examples import toy
from tests.examples.scripts import script


class LoadsItsModel:
    """Keeps the model where lmms-eval 0.7.3 does."""

    def __init__(self, pretrained: str) -> None:
        self._model = AutoModelForImageTextToText.from_pretrained(pretrained)


class AsksAServer:
    """Has no model."""


@pytest.fixture
def find(monkeypatch):
    """What finds a model's class by its name, once the example is imported."""
    known = {"llava_hf": LoadsItsModel, "openai": AsksAServer}
    registry = SimpleNamespace(get_model_class=lambda name, force_simple=False: known[name])
    for name, content in {
        "lmms_eval": {},
        "lmms_eval.cli": {},
        "lmms_eval.cli.dispatch": {"main": None},
        "lmms_eval.models": {"MODEL_REGISTRY_V2": registry},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "lmms_eval_many", raising=False)
    script("lmms_eval_many")
    return registry.get_model_class


def test_a_model_gets_the_adapter(find, tmp_path):
    base = str(toy.save_base(tmp_path / "base"))
    adapter = str(tmp_path / "adapter")
    get_peft_model(AutoModelForImageTextToText.from_pretrained(base), MAnyConfig(r=2)).save_pretrained(adapter)

    model = find("llava_hf")(pretrained=base, peft=adapter)._model
    assert isinstance(model, PeftModel)
    assert model.active_peft_config.peft_type == "MANY"
    assert not isinstance(find("llava_hf")(pretrained=base)._model, PeftModel)


def test_a_model_elsewhere_gets_none(find):
    find("openai")()
    with pytest.raises(TypeError, match="AsksAServer does not load the model itself"):
        find("openai")(peft="merged")
