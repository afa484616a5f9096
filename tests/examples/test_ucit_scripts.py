"""The scripts at toy size, for real: train, measure, merge, answer, score."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import typer.testing
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch.optim import AdamW

import peft_many
from tests import new_process, tiny
from tests.examples import toy
from tests.hub.llava_files import checkpoint

train, merge, evaluate, measure = (toy.example(name) for name in ("train", "merge", "evaluate", "measure"))

LAUNCH = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu"
ROOT = Path(__file__).parents[2]
FAST = {
    "learning_rate": 3e-2,
    "projector_learning_rate": 3e-3,
    "batch_size": 4,
    "total_batch_size": 8,
    "epochs": 5,
    "dtype": "float32",
    "workers": 0,
    "statistics_samples": 8,
    "gradient_checkpointing": False,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base model, and three tasks of which two contradict each other."""
    folder = tmp_path_factory.mktemp("ucit")
    toy.save_base(folder / "base")
    toy.add_task(folder / "UCIT", "IconQA", ["red"] * 16)
    toy.add_task(folder / "UCIT", "ArxivQA", ["blue"] * 16)
    toy.add_captions(folder / "UCIT", "VizWiz", [["red image", "a red image"], ["a blue image"]])
    return folder


def train_one(place: Path, task: str, output: Path, **options: Any) -> Path:
    train.main(task=task, data=place / "UCIT", output=output, model=str(place / "base"), **{**FAST, **options})
    return output


@pytest.fixture(scope="module")
def adapters(place) -> dict[str, Path]:
    return {task: train_one(place, task, place / "adapters" / task) for task in ("IconQA", "ArxivQA")}


def answers(place: Path, adapter: Path | None, tasks: list[str], **options: Any) -> tuple[dict[str, Any], Path]:
    output = place / "results" / (adapter.name if adapter else "zero")
    evaluate.main(
        task=tasks,
        data=place / "UCIT",
        output=output,
        adapter=None if adapter is None else str(adapter),
        model=str(place / "base"),
        batch_size=5,
        max_new_tokens=4,
        **{"dtype": "float32", **options},
    )
    return json.loads((output / "scores.json").read_text()), output


def test_train_merge_and_evaluate(place, adapters):
    tasks = ["IconQA", "ArxivQA"]
    zero, _ = answers(place, None, tasks)
    assert zero["mean"] == 0
    for task in tasks:
        config = PeftConfig.from_pretrained(adapters[task])
        assert (config.r, config.lora_alpha, config.lora_dropout, config.task_name) == (16, 32, 0.05, task)
        assert not (place / "adapters" / f"{task}-run").exists()
        found, output = answers(place, adapters[task], tasks)
        assert {name: score["accuracy"] for name, score in found["scores"].items()} == {
            "IconQA": 100 * (task == "IconQA"),
            "ArxivQA": 100 * (task == "ArxivQA"),
        }
        lines = [json.loads(line) for line in (output / f"{task}.jsonl").read_text().splitlines()]
        assert [line["question_id"] for line in lines] == list(range(16))
        assert {line["text"] for line in lines} == {"red" if task == "IconQA" else "blue"}
    half, _ = answers(place, adapters["IconQA"], ["IconQA"], dtype="bfloat16")
    assert half["mean"] == 100
    merged = place / "merged"
    merge.main([str(adapters[task]) for task in tasks], merged)
    assert set(PeftConfig.from_pretrained(merged).merge.names) == set(tasks)
    found, _ = answers(place, merged, tasks)
    assert found["mean"] == sum(score["accuracy"] for score in found["scores"].values()) / 2
    assert found["mean"] >= 50


def test_the_projector_has_a_rate_of_its_own(place):
    model = peft_many_model(place, torch.bfloat16)
    groups = train.parameter_groups(model, 2e-5)
    rates = [group["lr"] for group in AdamW(groups, lr=2e-4).param_groups]
    assert rates == [2e-4, 2e-5]
    assert len(groups[0]["params"]) == 2 * 7 * 2
    assert len(groups[1]["params"]) == 4
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trainable)
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen == {torch.bfloat16}


def peft_many_model(place: Path, dtype: torch.dtype) -> PeftModel:
    base = tiny.build("llava", dtype=dtype)
    return train.get_peft_model(base, peft_many.MAnyConfig(r=2))


@pytest.mark.slow
def test_by_accelerate_launch_in_bfloat16(place, tmp_path, monkeypatch):
    arguments = [
        *("--task", "IconQA", "--data", str(place / "UCIT"), "--output", str(tmp_path / "adapter")),
        *("--model", str(place / "base"), "--batch-size", "2", "--total-batch-size", "4", "--limit", "8"),
        *("--statistics-samples", "4", "--workers", "0", "--epochs", "1"),
    ]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    words = [*LAUNCH.split(), str(toy.UCIT / "train.py"), *arguments]
    (_, program, *told), environment = prepare_simple_launcher_cmd_env(launch_command_parser().parse_args(words))
    done = new_process.run(Path(program), *told, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Trained IconQA on 8 examples" in done.stdout
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(weights[key].abs().max() > 0 for key in weights)
    statistics = PeftConfig.from_pretrained(tmp_path / "adapter").statistics.tasks[0]
    assert (statistics.name, statistics.samples, statistics.images) == ("IconQA", 4, 4)
    base = tiny.build("llava").model.multi_modal_projector
    own = weights["base_model.model.model.multi_modal_projector.linear_1.weight"]
    assert 0 < (own - base.linear_1.weight).abs().max() < 2e-3, "two steps at a rate of 2e-5, from bfloat16 weights"


def test_an_interrupted_run_goes_on_to_the_same_end(place, tmp_path, monkeypatch):
    options = {"epochs": 2, "limit": 16, "checkpoint_steps": 2}
    straight = train_one(place, "IconQA", tmp_path / "straight", **options)
    read = train.Examples.__getitem__
    seen: list[int] = []

    def interrupted(self: Any, index: int) -> dict[str, Any]:
        seen.append(index)
        if len(seen) > 3 * 8:
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(train.Examples, "__getitem__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_one(place, "IconQA", tmp_path / "resumed", **options)
    assert not (tmp_path / "resumed").exists()
    assert [path.name for path in (tmp_path / "resumed-run").iterdir()] == ["checkpoint-2"]
    resumed = train_one(place, "IconQA", tmp_path / "resumed", **options)
    assert not (tmp_path / "resumed-run").exists()
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (straight, resumed))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-6, rtol=1e-5)


def test_an_imported_checkpoint_is_measured_and_merges(place, adapters, tmp_path):
    imported = peft_many.import_llava_checkpoint(checkpoint(tmp_path / "ArxivQA"), tmp_path / "imported")
    measure.main(
        str(imported),
        task="ArxivQA",
        data=place / "UCIT",
        output=tmp_path / "measured",
        model=str(place / "base"),
        samples=8,
        dtype="float32",
    )
    merge.main([str(adapters["IconQA"]), str(tmp_path / "measured")], tmp_path / "merged")
    assert set(PeftConfig.from_pretrained(tmp_path / "merged").merge.names) == {"IconQA", "ArxivQA"}


@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")
def test_captions_are_scored(place):
    pytest.importorskip("pycocoevalcap", reason="the extra `ucit` is not installed")
    found, output = answers(place, None, ["VizWiz"], leave_out=["METEOR"])
    assert list(found["scores"]["VizWiz"]) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    assert "mean" not in found
    assert len((output / "VizWiz.jsonl").read_text().splitlines()) == 2


def test_captions_left_out_leave_answers(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ModuleNotFoundError, match="peft-many"):
        answers(place, None, ["VizWiz"])
    found, output = answers(place, None, ["VizWiz", "IconQA"], leave_out=["BLEU", "METEOR", "ROUGE-L", "CIDEr"])
    assert found["scores"] == {"VizWiz": {}, "IconQA": {"accuracy": 0.0}}
    assert "mean" not in found
    assert len((output / "VizWiz.jsonl").read_text().splitlines()) == 2


def test_wrong_commands_say_what_is_wrong(place, tmp_path):
    with pytest.raises(typer.BadParameter, match="64 examples to a step cannot be made of passes of 5"):
        train_one(place, "IconQA", tmp_path / "x", batch_size=5, total_batch_size=64)
    with pytest.raises(ValueError, match="no task 'COCO'"):
        train_one(place, "COCO", tmp_path / "x")
    with pytest.raises(ValueError, match="`--dtype` must be one of bfloat16"):
        train_one(place, "IconQA", tmp_path / "x", dtype="int8")
    with pytest.raises(typer.BadParameter, match="not empty"):
        train_one(place, "IconQA", place / "base")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("script", ["train", "measure", "merge", "evaluate"])
def test_scripts_explain_themselves(script):
    module = toy.example(script)
    app = typer.Typer()
    app.command()(module.main)
    shown = typer.testing.CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert module.main.__doc__.split(".")[0][:20] in shown.output


def test_internvl(tmp_path):
    pytest.importorskip("torchvision", reason="InternVL's processor needs it")
    toy.save_base(tmp_path / "base", "internvl")
    toy.add_task(tmp_path / "UCIT", "IconQA", ["red"] * 16)
    adapter = train_one(tmp_path, "IconQA", tmp_path / "adapter")
    found, _ = answers(tmp_path, adapter, ["IconQA"])
    assert found["scores"]["IconQA"]["accuracy"] == 100
