"""The demo's tasks, its baselines, and its story in small."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_many import MAnyConfig
from peft_many.bench.model import MODELS, Collator
from peft_many.bench.training import train
from peft_many.demo import baselines
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


def test_the_average_is_the_mean_of_deltas_and_projectors(tmp_path):
    for t in range(2):
        torch.manual_seed(t)
        model = get_peft_model(LLAVA.load(), MAnyConfig(r=2 + 0 * t, lora_alpha=6, init_lora_weights=False))
        model.save_pretrained(tmp_path / str(t))
        path = tmp_path / str(t) / "adapter_model.safetensors"
        moved = {k: v + 0.1 * torch.randn_like(v) for k, v in load_file(path).items()}
        save_file(moved, path)
    folders = [tmp_path / "0", tmp_path / "1"]
    name = "model.language_model.layers.1.mlp.down_proj"
    models = [PeftModel.from_pretrained(LLAVA.load(), folder) for folder in folders]
    deltas = [model.get_base_model().get_submodule(name).get_delta_weight("default") for model in models]
    mean = baselines.averaged(LLAVA.load(), folders).get_base_model()
    torch.testing.assert_close(mean.get_submodule(name).get_delta_weight("default"), (deltas[0] + deltas[1]) / 2)
    projectors = [model.get_base_model().model.multi_modal_projector.linear_1.weight for model in models]
    torch.testing.assert_close(mean.model.multi_modal_projector.linear_1.weight, (projectors[0] + projectors[1]) / 2)
    mixed = baselines.with_projector_of(LLAVA.load(), *folders).get_base_model()
    assert torch.equal(mixed.model.multi_modal_projector.linear_1.weight, projectors[1])
    torch.testing.assert_close(mixed.get_submodule(name).get_delta_weight("default"), deltas[0])


@pytest.mark.slow
def test_the_demo_in_small_tells_its_story(tmp_path, monkeypatch, capsys):
    """A sixth of the training: what must hold is the order, not the numbers."""
    monkeypatch.setattr("sys.argv", ["demo", "--output", str(tmp_path), "--steps", "75", "--tests", "60"])
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
