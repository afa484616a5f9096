"""The demo's world: drawn from seeds, spoken in a closed vocabulary, seen by the checkpoint that ships with it."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_many import MAnyConfig
from peft_many.demo import baselines
from peft_many.demo.__main__ import main
from peft_many.demo.model import Collator, build_tokenizer, load_model, load_tokenizer
from peft_many.demo.run import load_merged
from peft_many.demo.tasks import TASKS, pretraining_examples
from peft_many.demo.training import accuracy, train


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_pictures_come_from_the_seed_alone():
    for task in TASKS:
        once, again, other = (task.examples(4, "train", seed) for seed in (1, 1, 2))
        assert all(np.array_equal(a.image, b.image) and a.turns == b.turns for a, b in zip(once, again))
        assert not all(np.array_equal(a.image, b.image) for a, b in zip(once, other))


def test_tasks_look_different_from_one_another_and_from_pre_training():
    looks = {task.name: np.stack([e.image for e in task.examples(20, "train", 0)]) for task in TASKS}
    looks["pre-training"] = np.stack([e.image for e in islice(pretraining_examples(0), 20)])
    means = [pictures.mean(axis=(0, 1, 2)) for pictures in looks.values()]
    for i, one in enumerate(means):
        assert all(np.abs(one - other).max() > 15 for other in means[i + 1 :])


def test_every_word_of_every_task_is_in_the_vocabulary(tokenizer):
    texts = [text for task in TASKS for e in task.examples(50, "test", 0) for turn in e.turns for text in turn]
    texts += [text for e in islice(pretraining_examples(0), 200) for turn in e.turns for text in turn]
    assert all(tokenizer.decode(tokenizer.convert_tokens_to_ids(text.split())) == text for text in texts)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_only_answers_are_learned(tokenizer):
    example = TASKS[0].examples(1, "train", 0)[0]
    batch = Collator(tokenizer)([example])
    learned = batch["input_ids"][batch["labels"] != -100]
    assert tokenizer.decode(learned, skip_special_tokens=True) == example.answer
    assert learned[-1] == tokenizer.eos_token_id


def test_the_checkpoint_answers_what_it_was_pre_trained_on(tokenizer):
    examples = [e for e in islice(pretraining_examples(7), 300) if e.question.startswith("which bar")]
    assert len(examples) > 10
    assert accuracy(load_model(), tokenizer, examples) > 90


def test_a_few_steps_of_training_move_the_answers(tokenizer):
    torch.manual_seed(0)
    task, collate = TASKS[2], Collator(tokenizer)
    model = get_peft_model(load_model(), MAnyConfig(r=4))
    losses = train(model, [collate(task.examples(16, "train", seed)) for seed in range(30)], 30, 4e-3)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_average_is_the_mean_of_deltas_and_projectors(tmp_path):
    for t in range(2):
        torch.manual_seed(t)
        model = get_peft_model(load_model(), MAnyConfig(r=2 + 0 * t, lora_alpha=6, init_lora_weights=False))
        model.save_pretrained(tmp_path / str(t))
        path = tmp_path / str(t) / "adapter_model.safetensors"
        moved = {k: v + 0.1 * torch.randn_like(v) for k, v in load_file(path).items()}
        save_file(moved, path)
    folders = [tmp_path / "0", tmp_path / "1"]
    name = "model.language_model.layers.1.mlp.down_proj"
    models = [PeftModel.from_pretrained(load_model(), folder) for folder in folders]
    deltas = [model.get_base_model().get_submodule(name).get_delta_weight("default") for model in models]
    mean = baselines.averaged(load_model(), folders).get_base_model()
    torch.testing.assert_close(mean.get_submodule(name).get_delta_weight("default"), (deltas[0] + deltas[1]) / 2)
    projectors = [model.get_base_model().model.multi_modal_projector.linear_1.weight for model in models]
    torch.testing.assert_close(mean.model.multi_modal_projector.linear_1.weight, (projectors[0] + projectors[1]) / 2)
    mixed = baselines.with_projector_of(load_model(), *folders).get_base_model()
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
