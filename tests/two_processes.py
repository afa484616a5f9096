"""Run by test_training in two processes: training, measuring, saving and merging under DistributedDataParallel."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from peft.utils import PeftWarning
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from peft_many import MAnyCallback, MAnyConfig, collect_statistics, merge_adapter_files
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.files.processes import ProcessFailedError
from tests import tiny
from tests.adapters import covariances
from tests.tuner.test_training import Samples, collate

torch.set_num_threads(1)
folder = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
main = accelerator.is_main_process


def assert_same(found, expected, tolerance: float) -> None:
    assert list(found.input_of) == list(expected.input_of)
    for name, covariance in covariances(expected).items():
        assert found.tokens_of(name) == expected.tokens_of(name)
        gap = torch.linalg.matrix_norm(found.covariance_of(name).dense() - covariance.dense(), 2)
        assert gap <= tolerance * covariance.trace, (name, gap / covariance.trace)
    assert dict(found.input_of) == dict(expected.input_of)
    for name, seen in expected.projectors.items():
        torch.testing.assert_close(found.projectors[name].prototype, seen.prototype, atol=1e-6, rtol=1e-5)
    assert (found.samples, found.images) == (expected.samples, expected.images)


for seed, name in enumerate(("names", "more")):
    torch.manual_seed(seed)
    model = get_peft_model(tiny.build("llava"), MAnyConfig(r=4, task_name=name))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    plain = DataLoader(Samples(model, 16), batch_size=4, collate_fn=collate)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, plain)
    assert isinstance(prepared, DistributedDataParallel)
    for _ in range(3):
        for batch in loader:
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    assert torch.equal(*accelerator.gather(weights[None]).unbind()), "the processes have trained apart"

    alone = collect_statistics(model, plain, energy=1.0, across_processes=False, progress=False).tasks[0]
    assert alone.samples == 16
    together = collect_statistics(prepared, loader, energy=1.0, progress=False).tasks[0]
    assert_same(together, alone, 1e-12)
    first = collect_statistics(prepared, loader, max_samples=8, progress=False).tasks[0]
    assert first.samples == 8
    sketched = collect_statistics(prepared, loader, rank=8, progress=False).tasks[0]
    best = collect_statistics(model, plain, rank=8, across_processes=False, progress=False).tasks[0]
    for layer, covariance in covariances(sketched).items():
        exact, trace = alone.covariance_of(layer).dense(), alone.covariance_of(layer).trace
        assert len(covariance.factor) <= 8
        error, error_alone = (
            torch.linalg.matrix_norm(c.dense() - exact, 2) / trace for c in (covariance, best.covariance_of(layer))
        )
        assert error < 1.5 * error_alone + 1e-3, (layer, error, error_alone)
    batches = list(plain)
    uneven = collect_statistics(prepared, batches if main else [], max_samples=None, energy=1.0, progress=False).tasks[
        0
    ]
    assert_same(uneven, alone, 1e-12)
    digest = torch.stack([c.dense().sum() for c in covariances(together).values()])
    assert torch.equal(*accelerator.gather(digest[None]).unbind()), "every process must hold the same statistics"

    def fail_in_the_second(model, batch):
        if not main:
            raise OSError("the disk is gone")
        return model(**batch)

    with pytest.raises(ProcessFailedError if main else OSError, match="the disk is gone"):
        collect_statistics(model, plain, forward_fn=fail_in_the_second, progress=False)

    assert not any("covariance" in name for name, _ in model.named_buffers()), (
        "DDP broadcasts buffers at every forward"
    )
    collect_statistics(prepared, loader, progress=False)
    model.save_pretrained(str(folder / name), is_main_process=main)
    accelerator.wait_for_everyone()

adapters = [folder / "names", folder / "more"]
merge_adapter_files(adapters, folder / "merged", progress=False)
assert (folder / "merged" / "adapter_model.safetensors").exists(), "no process leaves before the merge is in its place"
for bad in (adapters if main else [folder / "names", folder / "nothing"], [folder / "names", folder / "names"]):
    with pytest.raises((UnmergeableAdapterError, OSError, ProcessFailedError)):
        merge_adapter_files(bad, folder / "bad", progress=False)
    assert not (folder / "bad").exists()

model = get_peft_model(tiny.build("llava"), MAnyConfig(r=4))
arguments = TrainingArguments(
    str(folder.with_name("run")), max_steps=2, report_to=[], save_strategy="no", use_cpu=True
)
callbacks = [MAnyCallback(adapter_name=None if main else "clever")]
trainer = Trainer(model, arguments, train_dataset=Samples(model), data_collator=collate, callbacks=callbacks)
with pytest.raises(ProcessFailedError if main else ValueError, match="There is no adapter 'clever'"):
    trainer.train()
assert trainer.state.global_step == 0
callbacks = [MAnyCallback(plain, forward_fn=fail_in_the_second)]
trainer = Trainer(model, arguments, train_dataset=Samples(model), data_collator=collate, callbacks=callbacks)
with pytest.warns(PeftWarning, match="could not be measured.*the disk is gone"):
    trainer.train()
assert trainer.state.global_step == 2
accelerator.wait_for_everyone()
accelerator.end_training()
