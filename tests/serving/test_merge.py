"""The merge that a server routes by, read without PEFT, and what cannot be routed by, refused in words."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from peft_many import merge_adapter_files
from peft_many.serving.merge import ServedMerge
from tests.adapters import WEIGHTS, make
from tests.exports.shelf import Shelf


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf(tmp_path_factory.mktemp("shelf"))


def test_it_is_the_merge_in_the_folder(shelf, tmp_path):
    merged = shelf.merge("abc", tmp_path / "merged", router="gaussian", top_k=2)
    read = ServedMerge.read(str(merged))
    assert read.record.names == ["a", "b", "c"]
    assert (read.record.options.router, read.record.options.top_k) == ("gaussian", 2)
    stored = load_file(merged / WEIGHTS)
    found = dict(read.projector_tensors())
    assert {f"base_model.model.{name}" for name in found} == {key for key in stored if "multi_modal" in key}
    assert all(torch.equal(tensor, stored[f"base_model.model.{name}"]) for name, tensor in found.items())
    assert {name.split(".")[2] for name in found} == {"experts", "prototypes", "directions", "variances"}


def test_it_may_route_words_alone(shelf, tmp_path):
    llama = [make(tmp_path / name, "llama", seed=seed, task_name=name).folder for seed, name in enumerate("xy")]
    merged = merge_adapter_files(llama, tmp_path / "merged", gate_by="instructions", progress=False)
    read = ServedMerge.read(str(merged))
    assert (read.record.names, read.record.routing, list(read.projector_tensors())) == (["x", "y"], {}, [])
    assert {name for name, _ in read.instruction_tensors()} == {"prototypes", "directions", "variances"}


def test_what_cannot_be_routed_by(shelf, tmp_path, monkeypatch):
    mean = shelf.merge("ab", tmp_path / "mean", projectors="mean")
    llama = [make(tmp_path / name, "llama", seed=seed, task_name=name).folder for seed, name in enumerate("xy")]
    text = merge_adapter_files(llama, tmp_path / "text", progress=False)
    asked = shelf.merge("ab", tmp_path / "asked", gate_by="instructions", route_by="instructions", abstain_above=4.0)
    torn = shutil.copytree(shelf.merge("ab", tmp_path / "merged"), tmp_path / "torn")
    config = json.loads((torn / "adapter_config.json").read_text())
    config["merge"]["routing"]["model.multi_modal_projector"]["width"] = -1
    (torn / "adapter_config.json").write_text(json.dumps(config))
    lacking = shutil.copytree(tmp_path / "merged", tmp_path / "lacking")
    (lacking / WEIGHTS).unlink()
    for source, said in {
        mean: "routes no projector, and no gate of it goes by instructions: serve it as a plain LoRA or model",
        text: "routes no projector, and no gate of it goes by instructions",
        asked: r"go by instructions \(`route_by='instructions'`\)",
        shelf.adapters["a"]: "no merge that can be routed by: it is the adapter of one task",
        torn: "no merge that can be routed by: .*the width -1",
        lacking: "is no merge: it has no adapter_model.safetensors",
        tmp_path: "is no merge: it has no adapter_config.json",
        tmp_path / "nowhere": "is no folder, and cannot be fetched from the Hub",
    }.items():
        with pytest.raises(ValueError, match=said):
            ServedMerge.read(str(source))
    for source in (None, 3, "", ["merged"]):
        with pytest.raises(ValueError, match='"peft_many" must name the folder or Hub id'):
            ServedMerge.read(source)
