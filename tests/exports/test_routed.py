"""Folded models that go on routing: one folder, one call, the outputs of the merge."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import PeftWarning
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from peft_many import ask_merge, export_routed_model, load_routed_model, merge_adapter_files
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.tuner.projector import ProjectorMixture
from tests import new_process
from tests.adapters import WEIGHTS, base, batches, distance, files, logits, make
from tests.exports.shelf import Shelf, text_logits


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


OPTIONS = {
    "cosine": {},
    "gaussian": {"router": "gaussian", "temperature": 0.5, "abstain_above": 2.0},
    "hard": {"top_k": 1},
    "half": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("names", ["ab", "abc"])  # c trained no projector: the base model's serves
def test_the_outputs_are_those_of_the_merge(shelf, tmp_path, names, options):
    merged = shelf.merge(names, tmp_path / "merged", **options)
    exported = export_routed_model(merged, tmp_path / "model", base_model=shelf.base)
    expected = logits(PeftModel.from_pretrained(base("llava"), merged), "llava")
    by_call = load_routed_model(exported.folder)
    by_transformers = AutoModelForImageTextToText.from_pretrained(exported.folder).eval()
    for model in (by_call, by_transformers):
        assert not any(isinstance(module, LoraLayer) for module in model.modules())
        assert any(isinstance(module, ProjectorMixture) for module in model.modules())
        assert distance(logits(model, "llava"), expected) < 1e-5
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["architectures"] == ["RoutedLlavaForConditionalGeneration"]  # which nobody reads as a plain model
    assert distance(logits(base("llava"), "llava"), expected) > 1e-2
    mean = logits(
        PeftModel.from_pretrained(base("llava"), shelf.merge(names, tmp_path / "m", projectors="mean")), "llava"
    )
    assert distance(mean, expected) > 1e-3


def test_it_generates_as_the_merge(shelf, tmp_path):
    merged = shelf.merge("ab", tmp_path / "merged")
    model = load_routed_model(export_routed_model(merged, tmp_path / "model", base_model=shelf.base).folder)
    expected = PeftModel.from_pretrained(base("llava"), merged)
    batch = batches(model, "llava", seed=50)[0]
    found = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected.generate(**batch, max_new_tokens=6, do_sample=False))


def test_other_dtypes_and_families(tmp_path):
    made = [make(tmp_path / name, "qwen2_5_vl", seed=seed, task_name=name).folder for seed, name in enumerate("ab")]
    merged = merge_adapter_files(made, tmp_path / "merged", progress=False)
    base("qwen2_5_vl").save_pretrained(tmp_path / "base")
    exported = export_routed_model(merged, tmp_path / "model", base_model=tmp_path / "base")
    expected = logits(PeftModel.from_pretrained(base("qwen2_5_vl"), merged), "qwen2_5_vl")
    assert distance(logits(load_routed_model(exported.folder), "qwen2_5_vl"), expected) < 1e-5
    half = load_routed_model(exported.folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    (mixture,) = (module for module in half.modules() if isinstance(module, ProjectorMixture))
    stored = load_file(exported.folder / WEIGHTS)
    (key,) = (key for key in stored if key.endswith(".prototypes"))
    assert torch.equal(mixture.prototypes, stored[key])  # float32, or they would route differently
    assert distance(logits(half, "qwen2_5_vl"), expected) < 0.1


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"gate_lora": True}, "chosen among by each row's images,"),
        ({"gate_by": "instructions", "abstain_above": 4.0}, "chosen among by each row's instruction,"),
        ({"gate_by": "both"}, "chosen among by each row's images and instruction, projectors routed per image"),
        ({"gate_by": "both", "route_by": "instructions"}, "instruction, projectors routed by each row's instruction."),
    ],
)
def test_a_gate_is_left_behind_and_said(shelf, tmp_path, gate, said):
    gated = shelf.merge("ab", tmp_path / "1", **gate)
    assert said in (gated / "README.md").read_text()
    exported = export_routed_model(gated, tmp_path / "2", base_model=shelf.base)
    assert any("gate_lora" in note for note in exported.notes)
    expected = PeftModel.from_pretrained(base("llava"), shelf.merge("ab", tmp_path / "3"))
    model = load_routed_model(exported.folder)
    assert distance(logits(model, "llava"), logits(expected, "llava")) < 1e-5
    assert distance(text_logits(model), text_logits(expected)) < 1e-5


def test_what_has_nothing_to_route_and_what_is_no_export(shelf, tmp_path):
    mean = shelf.merge("ab", tmp_path / "mean", projectors="mean")
    before = files(tmp_path)
    for adapter in (mean, shelf.adapters["a"]):
        with pytest.raises(ValueError, match=r"routes no projector: `export_model` \(`--format model`\) keeps"):
            export_routed_model(adapter, tmp_path / "model", base_model=shelf.base)
    routed = export_routed_model(shelf.merge("ab", tmp_path / "ab"), tmp_path / "routed", base_model=shelf.base).folder
    with pytest.raises(ValueError, match=r"It is a routed model, .*load it by `load_routed_model`"):
        ask_merge(routed, "What is it ?", base_model=shelf.base)
    with pytest.warns(PeftWarning, match=r"is a part of a routed model, .* Load it by `load_routed_model`"):
        PeftModel.from_pretrained(base("llava"), routed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        load_routed_model(routed)
    before = files(tmp_path)
    for folder in (mean, shelf.base):
        with pytest.raises(ValueError, match="no model that `export_routed_model` wrote"):
            load_routed_model(folder)
    assert files(tmp_path) == before


def test_it_is_no_adapter_to_merge(shelf, tmp_path):
    exported = export_routed_model(shelf.merge("ab", tmp_path / "1"), tmp_path / "2", base_model=shelf.base)
    with pytest.raises(UnmergeableAdapterError, match=r"is a routed model .* merge what it was exported from"):
        merge_adapter_files([exported.folder, shelf.adapters["c"]], tmp_path / "3", progress=False)


@pytest.mark.slow
def test_one_import_and_one_call_in_a_new_process(shelf, tmp_path):
    merged = shelf.merge("ab", tmp_path / "merged")
    exported = export_routed_model(merged, tmp_path / "model", base_model=shelf.base)
    model = PeftModel.from_pretrained(base("llava"), merged)
    batch = batches(model, "llava", seed=50)[0]
    torch.save(batch, tmp_path / "batch")
    program = (
        "import sys, torch, peft_many; model = peft_many.load_routed_model(sys.argv[1]); "
        "batch = torch.load(sys.argv[2]); torch.save(model(**batch).logits.detach(), sys.argv[3])"
    )
    done = new_process.run(program, exported.folder, tmp_path / "batch", tmp_path / "logits")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert distance(torch.load(tmp_path / "logits"), model(**batch).logits) < 1e-5


def test_transformers_serve_loads_it_or_stops(shelf, tmp_path):
    """What `docs/how-to/transformers-serve.md` says of it, but for the web server around."""
    merged = shelf.merge("ab", tmp_path / "merged")
    exported = export_routed_model(merged, tmp_path / "model", base_model=shelf.base)
    batch = batches(base("llava"), "llava", seed=50)[0]
    torch.save(batch, tmp_path / "batch")
    program = """
import sys, torch
from transformers.cli.serving.model_manager import ModelManager
manager = ModelManager(device="cpu", dtype="float32")
try:
    manager._load_model(f"{sys.argv[1]}@main")
except KeyError as error:
    print(error)
import peft_many
model = manager._load_model(f"{sys.argv[1]}@main")
torch.save(model(**torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
"""
    done = new_process.run(program, exported.folder, tmp_path / "batch", tmp_path / "logits")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "'MANY'"
    with torch.no_grad():
        expected = load_routed_model(exported.folder, dtype=torch.float32)(**batch).logits
    assert distance(torch.load(tmp_path / "logits"), expected) < 1e-6
