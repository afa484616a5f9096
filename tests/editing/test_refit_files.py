"""`refit_merge_files` and `peft-many refit`: what `refit_merge` does, from folder to folder, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from peft_many import MAnyConfig, inspect_adapter, measure_adapter, merge_adapter_files, refit_merge, refit_merge_files
from peft_many.commands import app
from peft_many.data.batches import ChatCollator, batches
from peft_many.data.reading import read_examples
from peft_many.hub.base_model import BaseModel
from tests.adapters import WEIGHTS, files, scatter
from tests.examples import toy

TASKS = ("colours", "tints")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, two measured adapters that keep prompts, and their merge, with and without gates."""
    root = tmp_path_factory.mktemp("refitted")
    toy.save_base(root / "base")
    for seed, task in enumerate(TASKS):
        rows = []
        for number, colour in enumerate(["red", "blue", "green", "grey"]):
            toy.save_image(root / f"{task}{number}.png", colour)
            rows.append({"image": f"{task}{number}.png", "question": "What colour is it ?", "answer": colour})
        toy.write(root / f"{task}.json", rows)
        model = get_peft_model(
            AutoModelForImageTextToText.from_pretrained(root / "base"), MAnyConfig(r=2, task_name=task)
        )
        scatter(model, seed)
        model.save_pretrained(root / f"{task}-plain")
        measure_adapter(
            root / f"{task}-plain",
            root / f"{task}.json",
            root / task,
            statistics_options={"keep_prompts": 4},
            progress=False,
        )
    for name, gate in (("merged", False), ("gated", True)):
        merge_adapter_files([root / task for task in TASKS], root / name, gate_lora=gate, progress=False)
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def assert_close(one: Path, two: dict[str, torch.Tensor]) -> None:
    found = weights(one)
    assert found.keys() == two.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)


def refitted(place: Path, calibration: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The same by hand."""
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(place / "base"), place / "merged")
    refit_merge(model, calibration, weigh_tokens=True, progress=False)
    model.save_pretrained(folder)
    return weights(folder)


def test_it_is_refit_merge_on_data(place: Path, tmp_path: Path) -> None:
    data = {task: place / f"{task}.json" for task in TASKS}
    assert refit_merge_files(place / "merged", tmp_path / "1", data, progress=False) == tmp_path / "1"
    collator = ChatCollator(AutoProcessor.from_pretrained(place / "base"))
    samples = {
        task: list(batches(read_examples(path, limit=128, seed=0), collator.training, 4))
        for task, path in data.items()
    }
    assert_close(tmp_path / "1", refitted(place, samples, tmp_path / "2"))
    assert [operation.kind for operation in inspect_adapter(tmp_path / "1").operations] == ["merge", "refit"]


def test_it_is_refit_merge_without_data(place: Path, tmp_path: Path) -> None:
    refit_merge_files(place / "merged", tmp_path / "1", progress=False)
    assert_close(tmp_path / "1", refitted(place, None, tmp_path / "2"))


def test_a_merge_is_refitted_in_its_place(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "merged", tmp_path / "merged")
    with pytest.raises(FileExistsError, match="overwrite"):
        refit_merge_files(tmp_path / "merged", tmp_path / "merged", progress=False)
    refit_merge_files(tmp_path / "merged", tmp_path / "merged", overwrite=True, progress=False)
    refit_merge_files(place / "merged", tmp_path / "new", progress=False)
    assert_close(tmp_path / "merged", weights(tmp_path / "new"))


@pytest.mark.parametrize(
    ("adapter", "data", "match"),
    [
        ("colours", None, "is no merge"),
        ("gated", None, "gate_lora"),
        ("merged", {"colours": []}, "`data` needs samples.*missing: tints"),
        ("merged", {"colours": [], "tints": [], "more": []}, "unknown: more"),
    ],
)
def test_what_cannot_be_is_known_before_a_model_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str, data: Any, match: str
) -> None:
    monkeypatch.setattr(BaseModel, "load_on", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=match):
        refit_merge_files(place / adapter, tmp_path / "out", data, progress=False)
    assert not (tmp_path / "out").exists()


def test_the_command(place: Path, tmp_path: Path) -> None:
    words = ["refit", place / "merged", "--rank", 3, "--samples", 4, "--no-weigh-tokens", "--quiet"]
    done = CliRunner().invoke(app, [str(word) for word in [*words, "--output", tmp_path / "1"]])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"The refitted merge: {tmp_path / '1'}\n"
    refit_merge_files(place / "merged", tmp_path / "2", rank=3, max_samples=4, weigh_tokens=False, progress=False)
    assert files(tmp_path / "1").keys() == files(tmp_path / "2").keys()
    assert_close(tmp_path / "1", weights(tmp_path / "2"))
    given = [f"{task}={place / f'{task}.json'}" for task in TASKS]
    more = ["refit", place / "merged", "--data", *given, "--quiet", "--output", tmp_path / "3"]
    assert CliRunner().invoke(app, [str(word) for word in more]).exit_code == 0
    again = CliRunner().invoke(app, [str(word) for word in [*more, "--data", given[0]]])
    assert again.exit_code == 2
    assert "given twice" in again.output
