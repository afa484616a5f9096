"""`MAnyCallback` in trainers of TRL with their own defaults (supervised on pictures and packed text, DPO, GRPO), and
measuring what TRL's command line trained.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

from peft_many import MAnyCallback, MAnyConfig, merge_adapter_files, merge_adapter_sequence
from peft_many.commands import app
from tests import tiny
from tests.adapters import WEIGHTS, logits
from tests.docs.pages import ROOT, commands
from tests.examples.scripts import script, training_arguments, write_toy
from tests.examples.toy import save_base, save_image

trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")
datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"), examples=64)


USUAL = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
WORDS = "the red circle is there . how many shapes are left ? three"


def conversations(toy: Path, task: str) -> datasets.Dataset:
    """The task's questions in the form that TRL's guides show: messages, and a list of images."""
    rows = [json.loads(line) for line in (toy / f"{task}.jsonl").read_text().splitlines()]
    return datasets.Dataset.from_list(
        [
            {
                "images": [Image.open(toy / row["image"])],
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": f"{row['answer']} <eos>"}],
            }
            for row in rows
        ]
    )


def test_sft_trainer_with_pictures(toy, tmp_path):
    trainer = trl.SFTTrainer(
        AutoModelForImageTextToText.from_pretrained(toy / "model"),
        trl.SFTConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=8,
            num_train_epochs=2,
            learning_rate=4e-3,
            logging_steps=4,
            **USUAL,
        ),
        train_dataset=conversations(toy, "scenes"),
        processing_class=AutoProcessor.from_pretrained(toy / "model"),
        peft_config=MAnyConfig(r=4, task_name="scenes"),
        callbacks=[MAnyCallback(max_samples=32)],
    )
    assert trainer.args.bf16, "the trainer's default, which measuring must bear"
    assert trainer.args.gradient_checkpointing, "another"
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0], losses
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before)
    trainer.save_model(str(tmp_path / "scenes"))

    task = PeftConfig.from_pretrained(tmp_path / "scenes").statistics.tasks[0]
    assert (task.name, task.samples, task.images) == ("scenes", 32, 32)
    projector = "model.multi_modal_projector"
    assert list(task.projectors) == [projector]
    data = script("question_data")
    collate = data.Collator(AutoProcessor.from_pretrained(toy / "model"))
    batch = collate([data.Questions(toy / "scenes.jsonl")[i] for i in range(4)])
    base = [AutoModelForImageTextToText.from_pretrained(toy / "model") for _ in range(2)]
    with torch.no_grad():
        own = PeftModel.from_pretrained(base[0], tmp_path / "scenes")(**batch).logits
        merged = merge_adapter_sequence(base[1], [tmp_path / "scenes"], progress=False)(**batch).logits
    torch.testing.assert_close(merged, own, atol=1e-4, rtol=1e-4)


def test_the_example_leaves_a_measured_adapter(toy, tmp_path):
    more = ["--batch-size", "8", "--epochs", "0.2", "--rank", "2", "--samples", "16", "--cpu"]
    trainer = script("train_with_trl").main(training_arguments(toy, "charts", tmp_path / "charts", more))
    learnt = next(iter(trainer.get_train_dataloader()))["labels"]
    assert ((learnt == trainer.processing_class.tokenizer.eos_token_id).sum(1) == 1).all()  # or it never stops
    task = PeftConfig.from_pretrained(tmp_path / "charts").statistics.tasks[0]
    assert (task.name, task.samples, task.images) == ("charts", 16, 16)
    assert task.instructions.count == 16


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_with_text(toy, tmp_path, packing):
    rows = [{"text": " ".join(WORDS.split()[: 4 + i % 8])} for i in range(24)]
    model = tiny.build_text("llama")
    tokens = sum(len(row["text"].split()) for row in rows)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=4,
            max_steps=2,
            max_length=32,
            packing=packing,
            bf16=False,
            **USUAL,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(toy / "model"),
        peft_config=MAnyConfig(r=4, task_name="words"),
        callbacks=[MAnyCallback(max_samples=None)],
    )
    trainer.train()
    task = trainer.model.peft_config["default"].statistics.tasks[0]
    counted = {measured.tokens for measured in task.inputs.values()}
    # The trainer ends every text by an end-of-sequence token; no padding may be counted.
    assert counted == {tokens + len(rows)}
    assert (task.samples < len(rows)) == packing, "packed texts share a row"


def test_dpo_measures_chosen_and_rejected_rows(toy, tmp_path):
    rejected = [{"role": "assistant", "content": "three <eos>"}]
    data = conversations(toy, "scenes").rename_column("completion", "chosen").select(range(16))
    trainer = trl.DPOTrainer(
        AutoModelForImageTextToText.from_pretrained(toy / "model"),
        args=trl.DPOConfig(str(tmp_path / "run"), per_device_train_batch_size=4, max_steps=2, **USUAL),
        train_dataset=data.add_column("rejected", [rejected] * len(data)),
        processing_class=AutoProcessor.from_pretrained(toy / "model"),
        peft_config=MAnyConfig(r=4, task_name="scenes"),
        callbacks=[MAnyCallback(max_samples=12)],
    )
    trainer.train()
    task = trainer.model.peft_config["default"].statistics.tasks[0]
    assert (task.samples, task.images) == (16, 16), "two batches of four pairs"
    trainer.save_model(str(tmp_path / "scenes"))
    merge_adapter_files([tmp_path / "scenes"], tmp_path / "merged", progress=False)


def test_grpo_measures_prompts_with_their_completions(toy, tmp_path):
    trainer = trl.GRPOTrainer(
        tiny.build_text("llama"),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=trl.GRPOConfig(
            str(tmp_path / "run"),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            max_steps=3,
            beta=0.1,  # which makes it call the model as a reference too
            **USUAL,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": WORDS[:20]}] * 8),
        processing_class=AutoTokenizer.from_pretrained(toy / "model"),
        peft_config=MAnyConfig(r=4, task_name="words"),
        callbacks=[MAnyCallback(max_samples=8)],
    )
    trained = []

    def note(model, args, kwargs):
        if model.training and torch.is_grad_enabled():
            trained.append(int(kwargs["attention_mask"].sum()))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    task = trainer.model.peft_config["default"].statistics.tasks[0]
    assert len(trained) == 3
    assert task.samples == 8
    assert {measured.tokens for measured in task.inputs.values()} == {sum(trained[-2:])}


def test_the_command_line_as_the_page_shows_it(tmp_path, monkeypatch):
    from trl.cli import main

    page = (ROOT / "docs/how-to/train-with-trl.md").read_text(encoding="utf-8")
    (trained,), (measured,) = commands(page, "trl", "sft"), commands(page, "peft-many", "measure")
    row = json.loads(re.search(r'`({"file_name".+?})`', page)[1])
    monkeypatch.chdir(tmp_path)
    base = save_base(Path("llava-hf/llava-1.5-7b-hf"))
    for number in range(4):
        save_image(Path(f"clevr-data/{number}.png"), "red")
    rows = [json.dumps({**row, "file_name": f"{number}.png"}) for number in range(4)]
    Path("clevr-data/metadata.jsonl").write_text("\n".join(rows))
    monkeypatch.setenv("HF_DATASETS_CACHE", "cache")  # of the process that it starts
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    main([*trained[1:], "--max_steps", "2", "--use_cpu", "--report_to", "none"])
    done = CliRunner().invoke(app, measured[1:])
    assert done.exit_code == 0, done.output

    (task,) = PeftConfig.from_pretrained("clevr").statistics.tasks
    assert (task.name, task.samples, task.images) == ("clevr", 4, 4)
    assert list(task.projectors) == ["model.multi_modal_projector"]
    models = [AutoModelForImageTextToText.from_pretrained(base) for _ in range(3)]
    ours = get_peft_model(models[0], MAnyConfig())
    ours.save_pretrained("ours")
    tensors = load_file(f"clevr/{WEIGHTS}")
    assert tensors.keys() == load_file(f"ours/{WEIGHTS}").keys(), "the layers and the projector of our own config"
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    own = logits(PeftModel.from_pretrained(models[1], "clevr"), "llava")
    merged = logits(merge_adapter_sequence(models[2], ["clevr"], progress=False), "llava")
    torch.testing.assert_close(merged, own, atol=1e-4, rtol=1e-4)
