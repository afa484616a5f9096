"""The demo's tasks, its baselines, and its story in small."""

import json

import pytest
import torch
from peft import get_peft_model

from peft_many import MAnyConfig
from peft_many.bench.model import MODELS, Collator
from peft_many.bench.training import train
from peft_many.demo.__main__ import main
from peft_many.demo.run import load_merged
from peft_many.demo.tasks import TASKS

LLAVA = MODELS["llava"]


def test_a_few_steps_of_training_move_the_answers():
    torch.manual_seed(0)
    task, collate = TASKS[2], Collator(LLAVA)
    model = get_peft_model(LLAVA.load(), MAnyConfig(r=4))
    losses = train(model, [collate(task.examples(16, "train", seed)) for seed in range(30)], 30, 4e-3)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.slow
def test_the_demo_in_small_tells_its_story(tmp_path, monkeypatch, capsys):
    """A sixth of the training: what must hold is the order, not the numbers."""
    monkeypatch.setattr("sys.argv", ["demo", "--output", str(tmp_path), "--steps", "75", "--tests", "60"])
    with pytest.raises(SystemExit, match="0"):
        main()
    told = capsys.readouterr().out
    assert "MAny" in told
    assert "each task alone" in told
    results = json.loads((tmp_path / "results.json").read_text())
    means = {method: sum(tasks.values()) / len(tasks) for method, tasks in results["accuracy"].items()}
    assert means["MAny"] > means["sequential fine-tuning"]
    assert means["MAny"] > means["averaging"]
    assert means["each task alone"] > means["zero-shot"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert [task["name"] for task in load_merged(tmp_path).peft_config["default"].tasks] == sorted(
        t.name for t in TASKS
    )
