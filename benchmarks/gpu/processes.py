"""Two processes on one device: DDP and FSDP2 measure, train and merge as one process does."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft_many import collect_statistics, merge_adapter_files

from .checks import deltas
from .lab import Checked, Lab, covariances, in_full_precision
from .model import Batch
from .paths import adapter_to_train, gradients
from .steps import Record, Step

TOGETHER = "merged together"
Work = Callable[[int, int, str, Path], Any]  # of a process's rank, their number, the device and a folder


def replicated(lab: Lab, record: Record) -> None:
    """DDP over gloo, in two processes: each measures and trains on half of the rows, and merges half of the layers."""
    checked, expected = lab.checked, _alone(lab)
    alone = merge_adapter_files(checked.folders, checked.scratch / "merged alone", device=lab.device, progress=False)
    _compare(record, *_in_processes(_replicated, 2, "gloo", lab), expected=expected)
    record.check("a merge shared out", deltas(checked.scratch / TOGETHER), deltas(alone), 1e-6)


def sharded(lab: Lab, record: Record) -> None:
    """FSDP2: in two processes on a CPU; on a GPU in one, since NCCL takes no two on the same."""
    count, backend = (1, "nccl") if lab.meter.is_cuda else (2, "gloo")
    record.number("processes", count)
    _compare(record, *_in_processes(_sharded, count, backend, lab), expected=_alone(lab))


def sharded_by_gloo(lab: Lab, record: Record) -> None:
    """FSDP2 in two processes on one GPU over gloo, as far as PyTorch can do that."""
    _compare(record, *_in_processes(_sharded, 2, "gloo", lab), expected=_alone(lab))


def _compare(record: Record, *found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    for rank, of_rank in enumerate(found):
        for what, right in expected.items():
            record.check(f"{what}, process {rank}", of_rank[what], right, 1e-3)


def _alone(lab: Lab) -> dict[str, dict[str, Tensor]]:
    model, batches = adapter_to_train(lab.checked, lab.device), lab.checked.batches(0)
    of_rows = gradients(model, batches[0])
    return {"gradients": of_rows, "statistics": _measured(model, batches)}


def _measured(model: Any, batches: Sequence[Batch]) -> dict[str, Tensor]:
    return covariances(collect_statistics(model, batches, energy=1.0, progress=False))


def _replicated(rank: int, count: int, device: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    checked = Checked(torch.device(device), folder)
    model, batches = adapter_to_train(checked, checked.device), checked.batches(0)
    wrapped = DistributedDataParallel(model)
    found = gradients(wrapped, {name: tensor.chunk(count)[rank] for name, tensor in batches[0].items()})
    inside = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    merge_adapter_files(checked.folders, folder / TOGETHER, device=device, across_processes=True, progress=False)
    return {"gradients": inside, "statistics": _measured(wrapped, batches[rank::count])}


def _sharded(rank: int, count: int, device: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    checked = Checked(torch.device(device), folder)
    model, batches = adapter_to_train(checked, checked.device), checked.batches(0)
    mesh = init_device_mesh(checked.device.type, (count,))
    for layer in model.get_base_model().model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = gradients(model, {name: tensor.chunk(count)[rank] for name, tensor in batches[0].items()})
    whole = {name: tensor.full_tensor() for name, tensor in found.items()}
    return {"gradients": whole, "statistics": _measured(model, batches[rank::count])}


def _in_processes(work: Work, count: int, backend: str, lab: Lab, limit: float = 90.0) -> list[Any]:
    """What `work` gave in each of new processes that are connected; an error if one failed, or took too long."""
    lab.checked.folders  # noqa: B018  # made once, here
    # Forked from a process that has the libraries; but one that only looked for a GPU has no child that may use it.
    context = multiprocessing.get_context("spawn" if lab.meter.is_cuda else "forkserver")
    context.set_forkserver_preload(["benchmarks.gpu.processes"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    told = [(work, rank, backend, str(lab.device), lab.scratch, place, pipes[rank][1]) for rank in range(count)]
    processes = [context.Process(target=_run, args=one, daemon=True) for one in told]
    for process in processes:
        process.start()
    end = time.monotonic() + limit
    try:
        return [_received(pipe, rank, end) for rank, (pipe, _) in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _received(pipe: Any, rank: int, end: float) -> Any:
    if not pipe.poll(max(0.0, end - time.monotonic())):
        raise TimeoutError(f"Process {rank} did not answer in time.")
    found, failure = pipe.recv()
    if failure is not None:
        raise RuntimeError(f"Process {rank} failed:\n{failure}")
    return torch.load(found)


def _run(work: Work, rank: int, backend: str, device: str, folder: Path, place: dict[str, str], pipe: Any) -> None:
    os.environ |= {**place, "RANK": str(rank), "LOCAL_RANK": "0"}
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    in_full_precision()
    try:
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=60))
        found = work(rank, int(place["WORLD_SIZE"]), device, folder)
        on_cpu = {what: {name: tensor.detach().cpu() for name, tensor in of.items()} for what, of in found.items()}
        file = folder / f"of_process_{rank}.pt"  # tensors in a pipe would end with the process
        torch.save(on_cpu, file)
        pipe.send((file, None))
        torch.distributed.destroy_process_group()
    except Exception:  # which is told where it is waited for
        pipe.send((None, traceback.format_exc()))


STEPS = (Step("two processes, DDP", replicated, 45), Step("FSDP2", sharded, 35))
ATTEMPTS = (Step("FSDP2 in two processes on one GPU", sharded_by_gloo, 35, attempt=True),)
