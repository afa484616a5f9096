"""What baselines do with projectors: one whose weights are the mean of the tasks' projectors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..files.adapter import TaskAdapter
from ..files.errors import UnmergeableAdapterError
from .checks import check_same_shape


def average_projectors(tasks: Sequence[TaskAdapter]) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
    """The weighted mean of every projector over the tasks that trained it; sums are float64.

    A task that did not train it does not count: what it would add is the base model's, which is not known here. What
    comes back are the names of the tasks in the mean of each projector, and the tensors by their full keys.
    """
    averaged: dict[str, list[str]] = {}
    tensors: dict[str, Tensor] = {}
    weighted = [task for task in tasks if task.weight > 0]
    for projector in sorted({name for task in weighted for name in task.projectors}):
        trained = [task for task in weighted if projector in task.projectors]
        check_same_tensors(projector, trained)
        averaged[projector] = [task.name for task in trained]
        for key in trained[0].projectors[projector]:
            parts = [(task, task.projectors[projector][key]) for task in trained]
            tensors[f"{projector}.{key}"] = _mean(parts, f"{projector}.{key}")
    return averaged, tensors


def _mean(parts: Sequence[tuple[TaskAdapter, Tensor]], key: str) -> Tensor:
    first = parts[0][1]
    if all(torch.equal(tensor, first) for _, tensor in parts[1:]):
        return first
    for task, tensor in parts:
        if not tensor.is_floating_point():
            raise UnmergeableAdapterError(
                f"{task.source}: the projector's tensor '{key}' is {tensor.dtype} and differs between tasks, so that "
                "no mean can be taken; only tensors of floating-point numbers can be averaged."
            )
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for _, tensor in parts])
    total = sum(task.weight for task, _ in parts)
    mean = torch.zeros_like(first, dtype=torch.float64)
    for task, tensor in parts:
        mean += task.weight / total * tensor.double()
    return mean.to(dtype)


def check_same_tensors(projector: str, tasks: Sequence[TaskAdapter]) -> None:
    """All tasks that trained a projector must hold the same tensors of it."""
    states = [task.projectors[projector] for task in tasks]
    for key in sorted({key for state in states for key in state}):
        shapes = [tuple(state[key].shape) if key in state else "missing" for state in states]
        check_same_shape(f"Tensor '{projector}.{key}'", zip(tasks, shapes))
