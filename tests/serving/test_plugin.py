"""The plugin without vLLM: what it registers, and that a server's processes never load PEFT."""

from __future__ import annotations

import configparser
import importlib.metadata
import logging
import re
import sys
from pathlib import Path

import pytest

from peft_many.serving.families import FAMILIES, KNOWN_VERSIONS
from peft_many.serving.plugin import register
from tests import new_process

ROOT = Path(__file__).parents[2]


class Registry:
    """Stands in for vLLM's."""

    def __init__(self):
        self.models = {}

    def register_model(self, architecture, model):
        self.models[architecture] = model


@pytest.fixture
def registry(monkeypatch):
    found = Registry()
    models = type(sys)("vllm.model_executor.models")
    models.ModelRegistry = found
    vllm = type(sys)("vllm")
    vllm.__version__ = "0.32.0+cpu"
    for name, module in {"vllm": vllm, "vllm.model_executor": type(sys)("m"), models.__name__: models}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_vllm_finds_it_by_itself():
    packaging = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (place,) = re.findall(r'entry-points\."vllm\.general_plugins"]\npeft_many = "(.+)"\n', packaging)
    assert importlib.metadata.EntryPoint("peft_many", place, "vllm.general_plugins").load() is register


def test_each_family_is_registered_without_being_imported(registry, monkeypatch):
    monkeypatch.delitem(sys.modules, "peft_many.serving.models", raising=False)  # tests with a real vLLM import it
    register()
    assert registry.models["LlavaForConditionalGeneration"] == (
        "peft_many.serving.models:LlavaForConditionalGeneration@0.32.0+cpu"
    )
    assert registry.models.keys() == {name for known in FAMILIES for name in (known, f"Routed{known}")}
    assert "peft_many.serving.models" not in sys.modules


def test_another_version_keeps_its_own_models(registry, monkeypatch, caplog):
    """Where these are called otherwise, ours could not be made of them, and nothing would load."""
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.99.0")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    register()
    assert registry.models == {}
    assert "routes images in vLLM 0.32, and this is 0.99.0: models are served as without it" in caplog.text


class Arguments:
    """Stands in for vLLM's `EngineArgs`."""

    def __init__(self, **asked):
        self.additional_config = asked

    def create_engine_config(self):
        return self  # what it is asked is all that is looked at


def test_what_is_broken_stops_those_who_ask_for_a_merge_and_no_others(registry, monkeypatch, caplog):
    module = type(sys)("vllm.engine.arg_utils")
    module.EngineArgs = Arguments
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Arguments, "create_engine_config", Arguments.create_engine_config)  # undone afterwards
    for broken in ("asked", "families"):
        monkeypatch.setitem(sys.modules, f"peft_many.serving.{broken}", None)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    register()
    register()  # as vLLM may
    assert registry.models == {}
    assert "peft_many cannot be loaded, so that nothing can be routed" in caplog.text
    other = Arguments(other=1)
    assert other.create_engine_config() is other
    with pytest.raises(ImportError, match="asked"):
        Arguments(peft_many="merged").create_engine_config()


def test_the_page_lists_the_families_and_versions():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert all(f"`{architecture}`" in page for architecture in FAMILIES)
    assert all(f"vLLM {version}" in page for version in KNOWN_VERSIONS)


def test_a_server_loads_no_peft_but_whoever_asks_gets_everything():
    program = """
import sys, types
sys.modules["vllm"] = types.ModuleType("vllm")
import peft_many
import peft_many.serving.families, peft_many.serving.merge, peft_many.serving.plugin, peft_many.serving.projector
import peft_many.serving.words
for name in ("peft", "accelerate"):
    assert name not in sys.modules, name
try:
    peft_many.nothing
except AttributeError as error:
    print(error)
from peft_many import MAnyConfig, metrics
import peft
assert peft.PeftConfig.from_peft_type(peft_type="MANY").__class__ is MAnyConfig
assert all(hasattr(peft_many, name) for name in peft_many.__all__)
"""
    done = new_process.subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "module 'peft_many' has no attribute 'nothing'" in done.stdout


def test_the_contract_holds_it_so():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    contract = config["importlinter:contract:served_without_peft"]
    assert re.findall(r"\w+", contract["forbidden_modules"]) == ["accelerate", "peft", "transformers"]
    assert contract["source_modules"].strip() == "peft_many.serving"
