"""Calibration samples of a merge's tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device

from ..files.statistics import TaskStatistics
from ..statistics.forward import batch_size, check_batches


def check_calibration(tasks: Mapping[str, TaskStatistics], calibration: Mapping[str, Iterable[Any]]) -> None:
    """There have to be samples of every task, and of no other."""
    if not isinstance(calibration, Mapping):
        raise ValueError(
            f"`calibration` must give each task's batches by its name, {{'{next(iter(tasks))}': …}}, but it is a "
            f"{type(calibration).__name__}."
        )
    unknown, missing = (sorted({*a} - {*b}) for a, b in ((calibration, tasks), (tasks, calibration)))
    if unknown or missing:
        said = f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}"
        raise ValueError(f"`calibration` needs samples of every task of the merge, {', '.join(tasks)}; {said}.")


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
