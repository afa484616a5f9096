"""Calibration samples of a merge's tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device

from ..files.statistics import AdapterStatistics, TaskStatistics
from ..records import MergeRecord
from ..statistics.forward import batch_size, check_batches, check_max_samples
from ..tuner.config import MAnyConfig


def check_numbers(ridge: float, rank: int | None, max_samples: Any) -> None:
    """Refuse a ridge, a rank or a number of samples that makes no sense, with a `ValueError`."""
    check_max_samples(max_samples)
    if not 0 < ridge < float("inf"):
        raise ValueError(f"`ridge` must be positive and finite, but it is {ridge}.")
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` must be at least 1, but it is {rank}.")


def check_can_be_refitted(
    config: Any, name: str, calibration: Mapping[str, Any] | None, argument: str = "calibration"
) -> tuple[MergeRecord, AdapterStatistics]:
    """A merge that can be refitted and its statistics, or a `ValueError` that says why it cannot.

    It has no gates, and there are samples or prompts of every task.
    """
    if not isinstance(config, MAnyConfig) or config.merge is None:
        raise ValueError(f"{name} is no merge, as `merge_adapter_sequence` makes them, so there is nothing to refit.")
    if config.merge.options.gate_lora:
        raise ValueError(
            f"{name} was merged with `gate_lora=True`, and a refit would overwrite the tasks' blocks that its gates "
            "choose among; refit a merge with `gate_lora=False`."
        )
    if not isinstance(config.statistics, AdapterStatistics):
        raise ValueError(f"{name} was loaded without its statistics, which hold its tasks' own deltas.")
    tasks = {task.name or "": task for task in config.statistics.tasks}
    if calibration is not None:
        _check_calibration(tasks, calibration, argument)
        return config.merge, config.statistics
    without = [task for task, measured in tasks.items() if measured.prompts is None and measured.weight > 0]
    if without:
        raise ValueError(
            f"No prompts were kept of {', '.join(map(repr, without))}, so that samples cannot be imagined. Give "
            f"samples of every task (`{argument}`, on the command line `--data TASK=FILE`), or measure the adapters "
            "by `collect_statistics(model, dataloader, keep_prompts=16)` (`peft-many measure --keep-prompts 16`) and "
            "merge them again."
        )
    return config.merge, config.statistics


def _check_calibration(tasks: Mapping[str, TaskStatistics], calibration: Mapping[str, Any], argument: str) -> None:
    """There have to be samples of every task, and of no other."""
    if not isinstance(calibration, Mapping):
        raise ValueError(
            f"`{argument}` must give each task's samples by its name, {{'{next(iter(tasks))}': …}}, but it is a "
            f"{type(calibration).__name__}."
        )
    unknown, missing = (sorted({*a} - {*b}) for a, b in ((calibration, tasks), (tasks, calibration)))
    if unknown or missing:
        said = f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}"
        raise ValueError(f"`{argument}` needs samples of every task of the merge, {', '.join(tasks)}; {said}.")


def samples_of(batches: Iterable[Any], most: int | None, task: str, device: torch.device) -> list[Any]:
    """A task's batches on the device, up to the one that reaches `most` rows."""
    check_batches(batches, most)
    found, rows = [], 0
    for batch in batches:
        found.append(send_to_device(batch, device))
        rows += batch_size(batch)
        if most is not None and rows >= most:
            break
    if not found:
        raise ValueError(f"`calibration` gave no batch of '{task}'.")
    return found
