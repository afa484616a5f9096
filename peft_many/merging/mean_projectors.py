"""What baselines do with projectors: one whose weights are the mean of the tasks' projectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..files.adapter import TaskAdapter
from ..files.stored_delta import UnmergeableAdapterError


def average_projectors(tasks: Sequence[TaskAdapter]) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
    """The weighted mean of every projector over the tasks that trained it; sums are float64.

    A task that did not train it has no say: what it would add is the base model's, which is not known here.

    Returns:
        `tuple`: By projector, the names of the tasks that have a say; and the tensors, by their full keys.
    """
    averaged: dict[str, list[str]] = {}
    tensors: dict[str, Tensor] = {}
    for projector in sorted({name for task in tasks for name in task.projectors}):
        heard = [task for task in tasks if projector in task.projectors and task.weight > 0]
        if not heard:
            continue
        check_same_shapes(projector, heard)
        averaged[projector] = [task.name for task in heard]
        for key in heard[0].projectors[projector]:
            parts = [(task, task.projectors[projector][key]) for task in heard]
            tensors[f"{projector}.{key}"] = _mean(parts, f"{projector}.{key}")
    return averaged, tensors


def _mean(parts: Sequence[tuple[TaskAdapter, Tensor]], key: str) -> Tensor:
    first = parts[0][1]
    if all(torch.equal(tensor, first) for _, tensor in parts[1:]):
        return first
    for task, tensor in parts:
        if not tensor.is_floating_point():
            raise UnmergeableAdapterError(f"{task.source}: tensor '{key}' is {tensor.dtype}, which has no mean.")
    dtype = first.dtype
    for _, tensor in parts[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    total = sum(task.weight for task, _ in parts)
    mean = torch.zeros_like(first, dtype=torch.float64)
    for task, tensor in parts:
        mean += task.weight / total * tensor.double()
    return mean.to(dtype)


def check_same_shapes(projector: str, tasks: Sequence[TaskAdapter]) -> None:
    """All tasks that trained a projector must hold the same tensors of it."""
    for task in tasks[1:]:
        one, two = tasks[0].projectors[projector], task.projectors[projector]
        for key in sorted({*one, *two}):
            shapes = [tuple(tensors[key].shape) if key in tensors else "missing" for tensors in (one, two)]
            if shapes[0] != shapes[1]:
                raise UnmergeableAdapterError(
                    f"Tensor '{projector}.{key}' is {shapes[0]} in {tasks[0].source}, but {shapes[1]} in "
                    f"{task.source}: they were trained on different base models."
                )
