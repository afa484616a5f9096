"""Measuring in two processes: whatever one of them has, lacks or fails at, both end, and with the right numbers."""

from __future__ import annotations

import multiprocessing
import warnings

import pytest
import torch
from peft import LoHaConfig, get_peft_model
from peft.utils import PeftWarning
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from peft_many import MAnyCallback, MAnyConfig, collect_statistics
from tests import tiny
from tests.adapters import covariances
from tests.forked import in_two_processes

ROWS = [
    {"input_ids": torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(seed))} for seed in range(4)
]


def adapted():
    torch.manual_seed(0)
    return get_peft_model(tiny.build_text("llama"), MAnyConfig(r=2, init_lora_weights=False))


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicated(model):
    return DistributedDataParallel(model)


def measured(model, batches, **options):
    """What is to be the same however the data was shared out: rows, tokens, traces, fingerprints."""
    (task,) = collect_statistics(model, batches, **{"energy": 1.0, "progress": False, **options}).tasks
    found = covariances(task)
    return {
        "samples": task.samples,
        "tokens": {name: task.tokens_of(name) for name in found},
        "traces": {name: round(float(one.trace), 4) for name, one in found.items()},
        "prints": {name: [round(value, 4) for value in values] for name, values in task.fingerprints.items()},
    }


@pytest.fixture(scope="module")
def alone():
    return measured(adapted(), ROWS)


@pytest.mark.parametrize("split", [(3, 1), (1, 3), (4, 0), (0, 4)], ids=str)
@pytest.mark.parametrize("wrapped", [replicated, sharded])
def test_shares_may_be_uneven_and_empty(alone, wrapped, split):
    def work(rank: int):
        return measured(wrapped(adapted()), [ROWS[: split[0]], ROWS[split[0] :]][rank], max_samples=None)

    assert in_two_processes(work) == [alone] * 2


def test_samples_are_counted_over_all_processes():
    def work(rank: int):
        model = adapted()
        return [
            measured(model, ROWS[:count] if rank else ROWS, max_samples=most)["samples"]
            for count, most in ((4, 8), (1, 8), (0, 5), (4, 1))
        ]

    assert in_two_processes(work) == [[8, 8, 6, 4]] * 2


@pytest.mark.parametrize("wrapped", [replicated, sharded])
def test_a_failure_of_one_is_a_failure_of_all(wrapped):
    def broken():
        yield ROWS[0]
        raise OSError("the disk is gone")

    def work(rank: int):
        model, found = wrapped(adapted()), []
        for batches, adapter in ((broken() if rank else ROWS, None), (ROWS, "none" if rank else None), ([], None)):
            try:
                collect_statistics(model, batches, adapter_name=adapter, progress=False)
            except (OSError, RuntimeError, ValueError) as error:
                found.append(f"{type(error).__name__}: {error}")
        return [*found, measured(model, ROWS)["samples"]]

    first, second = in_two_processes(work)
    assert first[0] == "ProcessFailedError: Process 1 failed: OSError: the disk is gone"
    assert second[0] == "OSError: the disk is gone"
    assert first[1].startswith("ProcessFailedError: Process 1 failed: ValueError: There")
    assert second[1].startswith("ValueError: There is no adapter 'none'")
    assert first[2] == second[2] == "ValueError: The dataloader gave no batch, so there is nothing to measure."
    assert first[3:] == second[3:] == [16], "afterwards all is as ever"


@pytest.mark.parametrize("wrapped", [replicated, sharded])
def test_a_forward_pass_that_goes_wrong_in_one_process_ends_both(wrapped):
    """Where weights are sharded the others may hear nothing, but that the connection is closed."""

    def fail(*_):
        raise MemoryError("no more")

    def work(rank: int):
        model = wrapped(adapted())
        batches = [{"inputs_embeds": torch.full((2, 6, 32), float("nan"))}, *ROWS] if rank else ROWS
        with pytest.raises(RuntimeError, match=r"q_proj' holds NaN or Inf"):
            collect_statistics(model, batches, progress=False)
        if rank:
            next(module for name, module in model.named_modules() if name.endswith("layers.0")).mlp.forward = fail
        collect_statistics(model, ROWS, progress=False)

    (first, _), second = in_two_processes(work)
    assert first in ("RuntimeError", "ProcessFailedError")
    assert second == ("MemoryError", "no more")


def test_a_call_that_one_process_makes_ends_and_says_how_to_make_it_alone(alone):
    over = multiprocessing.get_context("fork").Event()

    def work(rank: int):
        model, said = adapted(), None
        if rank == 0:
            try:
                collect_statistics(model, ROWS, progress=False)
            except TimeoutError as error:
                said = str(error)
            assert measured(model, ROWS, across_processes=False) == alone
            over.set()
        assert over.wait(60)
        return said, measured(model, ROWS[rank::2])["samples"]

    (said, samples), second = in_two_processes(work, timeout=10.0)
    assert "process 1 of 2 did not within 5 seconds" in said
    assert "`across_processes=False`" in said
    assert (samples, second) == (8, (None, 8))


def test_sharded_weights_take_everyone(alone):
    def work(rank: int):
        return measured(sharded(adapted()), ROWS, across_processes=False) if rank == 0 else None

    (kind, said), _ = in_two_processes(work)
    assert kind == "ValueError"
    assert "sharded over processes" in said


def test_other_methods_are_measured_where_fsdp2_shards():
    def model():
        torch.manual_seed(0)
        config = LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)
        return get_peft_model(tiny.build_text("llama"), config)

    expected = measured(model(), ROWS)
    assert in_two_processes(lambda rank: measured(sharded(model()), ROWS[rank::2])) == [expected] * 2


def test_fsdp1_is_refused_before_anything_runs():
    def work(rank: int):
        model = FullyShardedDataParallel(adapted(), use_orig_params=True, device_id=torch.device("cpu"))
        collect_statistics(model, ROWS, progress=False)

    for kind, said in in_two_processes(work):
        assert kind in ("ValueError", "ProcessFailedError")
        assert "FSDP1 flattens weights" in said
        assert "fsdp_version: 2" in said


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.cat([batch["input_ids"] for batch in ROWS])[index]
        return {"input_ids": ids, "labels": ids}


def trained(tmp_path, **options):
    """What a callback measured after two steps, or how it failed; the errors and warnings of training."""
    model = adapted()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Trainer(model, arguments, train_dataset=Texts(), callbacks=[MAnyCallback(**options)]).train()
    statistics = model.peft_config["default"].statistics
    said = [str(one.message) for one in seen if issubclass(one.category, PeftWarning)]
    return statistics and statistics.tasks[0].samples, [one for one in said if "have no `labels`" not in one]


def test_the_callback_measures_in_all_processes(tmp_path):
    assert in_two_processes(lambda rank: trained(tmp_path)) == [(8, [])] * 2


def test_training_is_refused_or_kept_in_all_processes(tmp_path):
    def broken(rank):
        yield ROWS[0]
        if rank:
            raise OSError("the disk is gone")

    def refused(rank: int):
        return trained(tmp_path, adapter_name="none" if rank else None)

    (first, _), (second, said) = in_two_processes(refused)
    assert (first, second) == ("ProcessFailedError", "ValueError")
    assert "no adapter 'none'" in said
    for measured_, (said,) in in_two_processes(lambda rank: trained(tmp_path, dataloader=broken(rank))):
        assert measured_ is None
        assert "could not be measured" in said
        assert "OSError: the disk is gone" in said
