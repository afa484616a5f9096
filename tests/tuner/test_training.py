"""Training as users do it: `Trainer` with the callback, and an Accelerate loop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from peft_many import MAnyCallback, MAnyConfig, collect_statistics, merge_adapter_files, merge_adapter_sequence
from tests import tiny
from tests.adapters import files

# On machines without a GPU too: it means torch's launcher, and the scripts ask for CPUs. `--cpu` would need MPI.
LAUNCH = (
    "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
)


class Samples(torch.utils.data.Dataset):
    """Images of two brightnesses, and the one token that names each."""

    def __init__(self, model, count=8):
        self.rows = []
        for i in range(count):
            row = tiny.batch(model, "llava", [[tiny.random_image("llava", i, style=i % 2)]], prompts=[[5, 6 + i % 2]])
            labels = row["input_ids"].clone()
            labels[:, :-1] = -100
            self.rows.append({**row, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def collate(rows):
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


@pytest.fixture
def model():
    return get_peft_model(tiny.build("llava"), MAnyConfig(r=4, task_name="names"))


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_trainer_with_the_callback_leaves_an_adapter_that_merges(model, tmp_path):
    samples, before = Samples(model), trainable(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model, arguments, train_dataset=samples, data_collator=collate, callbacks=[MAnyCallback(max_samples=6)]
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "names"))
    after = trainable(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    task = model.peft_config["default"].statistics.tasks[0]
    assert (task.name, task.samples, task.images) == ("names", 8, 8)
    model.eval()
    with torch.no_grad():
        batch = collate([samples[0], samples[1]])
        expected = model(**batch).logits
        merged = merge_adapter_sequence(tiny.build("llava"), [tmp_path / "names"], progress=False)
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_callback_measures_on_its_own_dataloader(model, tmp_path):
    samples = Samples(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    own = DataLoader(samples, batch_size=1, collate_fn=collate)
    callback = MAnyCallback(own, max_samples=3)
    Trainer(model, arguments, train_dataset=samples, data_collator=collate, callbacks=[callback]).train()
    assert model.peft_config["default"].statistics.tasks[0].samples == 3


def test_an_accelerate_loop_learns_and_is_measured_as_prepared(model):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = DataLoader(Samples(model), batch_size=4, shuffle=True, collate_fn=collate)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(10):
        for batch in loader:
            loss = prepared(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    statistics = collect_statistics(prepared, loader, progress=False)
    assert statistics.tasks[0].samples == 8
    assert accelerator.unwrap_model(prepared).peft_config["default"].statistics is statistics


@pytest.mark.slow
def test_two_processes_train_one_adapter_that_merges(tmp_path):
    launch("two_processes.py", tmp_path)
    merged = merge_adapter_sequence(tiny.build("llava"), [tmp_path / "names"], progress=False)
    assert merged.peft_config["default"].merge.names[0] == "names"
    merge_adapter_files([tmp_path / "names", tmp_path / "more"], tmp_path / "alone", progress=False)
    assert files(tmp_path / "merged") == files(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "merged", "more", "names"]


@pytest.mark.slow
def test_fsdp_shards_are_measured_as_one_process_would(tmp_path):
    launch("two_processes_sharded.py", tmp_path)


def launch(name: str, folder: Path) -> None:
    """Run a script of the tests in two processes."""
    script = Path(__file__).parents[1] / name
    arguments = ["-m", "accelerate.commands.launch", *LAUNCH.split(), str(script), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
