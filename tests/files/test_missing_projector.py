"""Task adapters whose weights file lacks a projector's tensor: a clear error wherever they are loaded from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_many import MAnyConfig, merge_adapter_files
from peft_many.files.errors import MalformedAdapterError, UnmergeableAdapterError
from peft_many.tuner.loaded_keys import check_projectors_are_there
from tests.adapters import PROJECTOR, WEIGHTS, base, distance, logits, make, state_digest
from tests.hub_server import StandInHub, talk_to

TENSOR = f"base_model.model.{PROJECTOR}.linear_1.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    made = {name: make(root / name, seed=seed, task_name=name).folder for seed, name in enumerate("ab")}
    made["mean"] = merge_adapter_files([made["a"], made["b"]], root / "mean", projectors="mean", progress=False)
    return made


def without(folder: Path, output: Path, pattern: str) -> Path:
    """A copy of an adapter that lacks some tensors."""
    shutil.copytree(folder, output)
    tensors = load_file(folder / WEIGHTS)
    left = {key: tensor for key, tensor in tensors.items() if not re.search(pattern, key)}
    assert len(left) < len(tensors)
    save_file(left, output / WEIGHTS)
    return output


@pytest.mark.parametrize("pattern", [r"linear_1\.weight$", r"multi_modal_projector"], ids=["one", "all"])
@pytest.mark.parametrize("name", ["a", "mean"])
def test_it_names_the_adapter_and_the_tensor_and_leaves_the_model_alone(good, tmp_path, name, pattern):
    broken = without(good[name], tmp_path / "broken", pattern)
    model = base("llava")
    before = state_digest(model)
    with pytest.raises(MalformedAdapterError, match=r"broken: .* lacks the tensor") as error:
        PeftModel.from_pretrained(model, broken)
    assert TENSOR in str(error.value)
    assert state_digest(model) == before
    with pytest.raises(MalformedAdapterError, match=r"broken: .* lacks the tensor"):
        model.load_adapter(str(broken))
    assert state_digest(model) == before


@pytest.mark.parametrize("kind", [MAnyConfig, LoraConfig])
def test_it_is_not_merged_as_if_it_had_trained_none(good, tmp_path, kind):
    plain = {"target_modules": r".*language_model.*q_proj", "modules_to_save": ["multi_modal_projector"]}
    whole = make(tmp_path / "whole", seed=3, kind=kind, **({} if kind is MAnyConfig else plain)).folder
    broken = without(whole, tmp_path / "broken", r"multi_modal_projector")
    for method in ("lpm", "average"):
        with pytest.raises(UnmergeableAdapterError, match=f"broken trained the projector '{PROJECTOR}'"):
            merge_adapter_files([good["a"], broken], tmp_path / "merged", method=method, progress=False)


def test_beside_an_adapter_that_is_whole(good, tmp_path):
    model = PeftModel.from_pretrained(base("llava"), good["b"])
    expected = logits(model, "llava")
    with pytest.raises(MalformedAdapterError, match="lacks the tensor"):
        model.load_adapter(without(good["a"], tmp_path / "broken", r"linear_2\.bias$"), "broken")
    assert distance(logits(model, "llava"), expected) == 0.0


def test_on_the_hub(good, tmp_path, monkeypatch):
    with StandInHub() as hub:
        talk_to(hub, monkeypatch, tmp_path)
        hub.add("me/broken", without(good["a"], tmp_path / "broken", r"linear_1\.weight$"))
        hub.add("me/whole", good["a"])
        with pytest.raises(MalformedAdapterError, match=r"me/broken: .* lacks the tensor"):
            PeftModel.from_pretrained(base("llava"), "me/broken")
        PeftModel.from_pretrained(base("llava"), "me/whole")
        assert hub.downloads().count(WEIGHTS) == 2  # one for each


def test_names_that_the_user_maps_are_none_of_our_business(good, tmp_path):
    shutil.copytree(good["a"], tmp_path / "old")
    tensors = load_file(good["a"] / WEIGHTS)
    assert TENSOR in tensors
    save_file({key.replace(PROJECTOR, "old_projector"): tensors[key] for key in tensors}, tmp_path / "old" / WEIGHTS)
    mapped = PeftModel.from_pretrained(base("llava"), tmp_path / "old", key_mapping={"old_projector": PROJECTOR})
    expected = PeftModel.from_pretrained(base("llava"), good["a"])
    assert distance(logits(mapped, "llava"), logits(expected, "llava")) == 0.0


def test_a_config_without_weights_can_be_trained_anew(good, tmp_path):
    shutil.copytree(good["a"], tmp_path / "config")
    (tmp_path / "config" / WEIGHTS).unlink()
    config = PeftConfig.from_pretrained(tmp_path / "config")
    get_peft_model(base("llava"), config)


def test_which_names_count_as_missing():
    expected = {"p": ["p.w", "p.b"], "q": ["q.w"]}
    whole = {"p.w", "p.b", "q.w", "x.lora_A.weight"}
    check_projectors_are_there(whole, nn.Module(), expected, "me/x")
    check_projectors_are_there((), nn.Module(), expected, "me/x")
    check_projectors_are_there({"p.w", "p.b", "renamed.w"}, nn.Module(), expected, "me/x")
    with pytest.raises(MalformedAdapterError, match=r"'p\.w' of the projector 'p'"):  # those of a merge, not of a task
        check_projectors_are_there({"p.experts.task_0.w", "q.w"}, nn.Module(), expected, "me/x")
    for gone in ("p.w", "p.b", "q.w"):
        with pytest.raises(MalformedAdapterError, match=f"me/x: .*'{gone}' of the projector '{gone[0]}'"):
            check_projectors_are_there(whole - {gone}, nn.Module(), expected, "me/x")
