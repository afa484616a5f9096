"""Merging the layers of one group, which share their input."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.lpm import LeastSquaresMerge, LowRankDelta, MergedDelta, SingularMergeError
from ..algebra.residual import relative_residuals
from ..files.fingerprints import weight_fingerprint
from ..files.statistics import check_covariance
from ..files.stored_delta import KEY_PREFIX, TASK_WEIGHT, UnmergeableAdapterError
from .by_method import merge_by_method
from .prepare import PreparedMerge


@dataclass(frozen=True)
class LayerRecord:
    """What the merge's statistics and its config say of a merged layer.

    Args:
        stacked (`bool`): As in [`MergedDelta`].
        fingerprints (`dict[str, list[float]]`): By task that trained it, of its block of the merged weights.
        residuals (`dict[str, float]`): What merging costs each task that trained it (`relative_residuals`).
    """

    stacked: bool
    fingerprints: dict[str, list[float]]
    residuals: dict[str, float]


@dataclass(frozen=True)
class MergedGroup:
    """What merging one group of layers gave.

    Args:
        tensors (`dict[str, torch.Tensor]`): For the weights file, by key.
        layers (`dict[str, LayerRecord]`): By layer.
    """

    tensors: dict[str, Tensor]
    layers: dict[str, LayerRecord]


def merge_group(plan: PreparedMerge, group: Sequence[str], device: str | torch.device) -> MergedGroup:
    """Merge layers that share their input; what was read for it is given back."""
    merged = merged_deltas(plan, group, device)
    layers = {
        module: LayerRecord(delta.stacked, _fingerprints(plan, module, delta), _residuals(plan, module, delta))
        for module, delta in merged.items()
    }
    plan.release()
    return MergedGroup(tensors_of(merged), layers)


def merged_deltas(plan: PreparedMerge, group: Sequence[str], device: str | torch.device) -> dict[str, MergedDelta]:
    """The merged delta of each layer of a group.

    Raises:
        UnmergeableAdapterError: There is none.
    """
    try:
        method = plan.options.merge_method
        return _merge_by_lpm(plan, group, device) if method is None else merge_by_method(plan, method, group, device)
    except (SingularMergeError, OverflowError) as error:
        raise UnmergeableAdapterError(f"'{group[0]}' cannot be merged: {error}.") from None


def tensors_of(merged: Mapping[str, MergedDelta]) -> dict[str, Tensor]:
    """Merged deltas, by layer, as a weights file holds them."""
    tensors = {}
    for module, delta in merged.items():
        for half, tensor in (("A", delta.A), ("B", delta.B)):
            tensors[f"{KEY_PREFIX}{module}.lora_{half}.weight"] = tensor.contiguous()
        if delta.task_A is not None:
            tensors[f"{KEY_PREFIX}{module}.{TASK_WEIGHT}"] = delta.task_A.contiguous()
    return tensors


def _merge_by_lpm(plan: PreparedMerge, group: Sequence[str], device: str | torch.device) -> dict[str, MergedDelta]:
    options = plan.options
    assert options.ridge is not None
    problem = LeastSquaresMerge(options.ridge, device)
    for task in plan.tasks:
        covariance = task.statistics.covariance_of(group[0])
        if covariance is not None:
            check_covariance(covariance, f"{task.source}: the covariance of '{group[0]}'")
            deltas = {module: task.deltas[module].read() for module in group if module in task.deltas}
            problem.add(covariance, deltas, task.weight)
    return problem.solve(options.rank, options.dtype, bool(options.gate_lora))


def _fingerprints(plan: PreparedMerge, module: str, merged: MergedDelta) -> dict[str, list[float]]:
    """By task, of its block of the merged weights, or of all of them where they have no blocks."""
    found, start = {}, 0
    for task in plan.tasks:
        if module in task.deltas:
            end = start + task.deltas[module].rank
            block = slice(start, end) if merged.stacked else slice(None)
            found[task.name] = weight_fingerprint(merged.A[block], merged.B[:, block])
            start = end
    return found


def _residuals(plan: PreparedMerge, module: str, merged: MergedDelta) -> dict[str, float]:
    """By task that trained a layer, [`relative_residuals`]; without those whose inputs nobody measured there."""
    tasks = [task for task in plan.tasks if module in task.deltas]
    deltas = [LowRankDelta(A=task.deltas[module].rows(), B=task.deltas[module].columns()) for task in tasks]
    covariances = [task.statistics.covariance_of(module) for task in tasks]
    found = relative_residuals(merged, list(zip(deltas, covariances)))
    return {task.name: residual for task, residual in zip(tasks, found) if not math.isnan(residual)}


def mean_residuals(residuals: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By task the mean over layers, from each layer's residuals by task; four digits are kept."""
    by_task: dict[str, list[float]] = {}
    for of_layer in residuals:
        for task, residual in of_layer.items():
            by_task.setdefault(task, []).append(residual)
    return {task: float(f"{math.fsum(found) / len(found):.4g}") for task, found in by_task.items()}
