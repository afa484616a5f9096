"""The demo's tasks, its baselines, and its story in small."""

import json

import pytest
import torch
from peft import get_peft_model
from typer.testing import CliRunner

from benchmarks.mini_ucit.model import MODELS, Collator
from benchmarks.mini_ucit.training import train
from examples.demo import run as running
from examples.demo.__main__ import app
from examples.demo.run import load_merged
from examples.demo.tasks import TASKS
from peft_many import MAnyConfig

LLAVA = MODELS["llava"]


def test_a_few_steps_of_training_move_the_answers():
    torch.manual_seed(0)
    task, collate = TASKS[2], Collator(LLAVA)
    model = get_peft_model(LLAVA.load(), MAnyConfig(r=4))
    losses = train(model, [collate(task.examples(8, "train", seed)) for seed in range(20)], 20, 4e-3)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.slow
def test_the_demo_in_small_tells_its_story(tmp_path, monkeypatch):
    """An eighteenth of the training, two of four tasks: what must hold is the order, not the numbers.

    MAny gets 38, averaging 15, sequential fine-tuning 13.
    """
    monkeypatch.setattr(running, "BATCH_SIZE", 16)
    monkeypatch.setattr(running, "TASKS", TASKS[2:])
    told = CliRunner().invoke(app, ["--output", str(tmp_path), "--steps", "50", "--tests", "24"]).stdout
    assert "MAny" in told
    assert "each task alone" in told
    results = json.loads((tmp_path / "results.json").read_text())
    means = {method: sum(tasks.values()) / len(tasks) for method, tasks in results["accuracy"].items()}
    assert means["MAny"] > means["sequential fine-tuning"]
    assert means["MAny"] > means["averaging"]
    assert means["each task alone"] > means["zero-shot"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert load_merged(tmp_path).peft_config["default"].merge.names == sorted(t.name for t in TASKS[2:])


def test_the_demo_passes_its_options_on(tmp_path, monkeypatch):
    asked: dict[str, object] = {}
    monkeypatch.setattr(running, "run", lambda output, **options: asked.update(output=output, **options))
    CliRunner().invoke(app, ["--output", str(tmp_path), "--seed", "3", "--steps", "7", "--tests", "9"])
    assert asked == {"output": tmp_path, "seed": 3, "steps": 7, "tests": 9}
