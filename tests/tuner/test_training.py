"""Training as users do it: `Trainer` with the callback, and an Accelerate loop."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from peft_many import MAnyCallback, MAnyConfig, collect_statistics, merge_adapter_files, merge_adapter_sequence
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.files.processes import ProcessFailedError
from tests import tiny
from tests.adapters import covariances, files
from tests.forked import in_two_processes


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


def check_measuring(accelerator, prepared, loader, model, plain) -> None:
    main = accelerator.is_main_process
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
    mine = batches if main else []
    uneven = collect_statistics(prepared, mine, max_samples=None, energy=1.0, progress=False).tasks[0]
    assert_same(uneven, alone, 1e-12)
    digest = torch.stack([c.dense().sum() for c in covariances(together).values()])
    assert torch.equal(*accelerator.gather(digest[None]).unbind()), "every process must hold the same statistics"

    def fail_in_the_second(model, batch):
        if not main:
            raise OSError("the disk is gone")
        return model(**batch)

    with pytest.raises(ProcessFailedError if main else OSError, match="the disk is gone"):
        collect_statistics(model, plain, forward_fn=fail_in_the_second, progress=False)


def train_and_merge(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    main = accelerator.is_main_process
    for seed, name in enumerate(("names", "more")):
        torch.manual_seed(seed)
        model = get_peft_model(tiny.build("llava"), MAnyConfig(r=4, task_name=name))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        plain = DataLoader(Samples(model, 16), batch_size=4, collate_fn=collate)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, plain)
        assert isinstance(prepared, DistributedDataParallel)
        for batch in loader:
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        assert torch.equal(*accelerator.gather(weights[None]).unbind()), "the processes have trained apart"

        if name == "names":
            check_measuring(accelerator, prepared, loader, model, plain)
        assert not any("covariance" in name for name, _ in model.named_buffers()), (
            "DDP broadcasts buffers at every forward"
        )
        collect_statistics(prepared, loader, progress=False)
        model.save_pretrained(str(folder / name), is_main_process=main)
        accelerator.wait_for_everyone()

    adapters = [folder / "names", folder / "more"]
    merge_adapter_files(adapters, folder / "merged", across_processes=True, progress=False)
    assert (folder / "merged" / "adapter_model.safetensors").exists(), (
        "no process leaves before the merge is in its place"
    )
    for bad in (adapters if main else [folder / "names", folder / "nothing"], [folder / "names", folder / "names"]):
        with pytest.raises((UnmergeableAdapterError, OSError, ProcessFailedError)):
            merge_adapter_files(bad, folder / "bad", across_processes=True, progress=False)
        assert not (folder / "bad").exists()


@pytest.mark.slow
def test_two_processes_train_one_adapter_that_merges(tmp_path):
    assert in_two_processes(lambda rank: train_and_merge(tmp_path), limit=300) == [None] * 2
    merged = merge_adapter_sequence(tiny.build("llava"), [tmp_path / "names"], progress=False)
    assert merged.peft_config["default"].merge.names[0] == "names"
    merge_adapter_files([tmp_path / "names", tmp_path / "more"], tmp_path / "alone", progress=False)
    assert files(tmp_path / "merged") == files(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "merged", "more", "names"]


def test_fsdp_shards_are_measured_as_one_process_would():
    assert in_two_processes(lambda rank: measure_shards()) == [None] * 2


def measure_shards() -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = get_peft_model(tiny.build("llava"), MAnyConfig(r=4, task_name="names", init_lora_weights=False))
    plain = DataLoader(Samples(model, 8), batch_size=2, collate_fn=collate)
    whole = collect_statistics(model, plain, energy=1.0, across_processes=False, progress=False).tasks[0]
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    base = model.get_base_model()
    for layer in base.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    weight = base.model.language_model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert weight.to_local().shape[0] < weight.shape[0], "nothing was sharded"
    sharded = collect_statistics(model, accelerator.prepare(plain), energy=1.0, progress=False).tasks[0]
    assert sharded.samples == 8
    for name, covariance in covariances(whole).items():
        torch.testing.assert_close(sharded.covariance_of(name).dense(), covariance.dense(), atol=1e-6, rtol=1e-4)
    for name, values in whole.fingerprints.items():
        torch.testing.assert_close(sharded.fingerprints[name], values)
    for name, seen in whole.projectors.items():
        torch.testing.assert_close(sharded.projectors[name].prototype, seen.prototype)
