"""Merging the layers of one group, which share their input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.lpm import LeastSquaresMerge, LowRankDelta, MergedDelta, SingularMergeError
from ..algebra.residual import relative_residuals
from ..files.errors import UnmergeableAdapterError
from ..files.fingerprints import weight_fingerprint
from ..files.stored_covariance import check_covariance
from ..files.tensor_keys import KEY_PREFIX, TASK_WEIGHT
from .by_method import merge_by_method
from .prepare import PreparedMerge


@dataclass(frozen=True)
class LayerRecord:
    """What the merge's statistics and its config say of a merged layer."""

    stacked: bool  # as in `MergedDelta`
    fingerprints: dict[str, list[float]]  # by task that trained it, of its block of the merged weights
    residuals: dict[str, float]  # what merging costs each task that trained it


def merge_group(
    prepared: PreparedMerge, group: Sequence[str], device: str | torch.device
) -> tuple[dict[str, Tensor], dict[str, LayerRecord]]:
    """Merge layers that share their input: tensors for the weights file, by key, and what to record of each layer."""
    merged = merged_deltas(prepared, group, device)
    records = {
        module: LayerRecord(delta.stacked, _fingerprints(prepared, module, delta), _residuals(prepared, module, delta))
        for module, delta in merged.items()
    }
    prepared.release()
    return tensors_of(merged), records


def merged_deltas(prepared: PreparedMerge, group: Sequence[str], device: str | torch.device) -> dict[str, MergedDelta]:
    """The merged delta of each layer of a group; an error names the group's first layer."""
    merge = _merge_by_lpm if prepared.options.merge_method is None else merge_by_method
    try:
        return merge(prepared, group, device)
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


def _merge_by_lpm(prepared: PreparedMerge, group: Sequence[str], device: str | torch.device) -> dict[str, MergedDelta]:
    options = prepared.options
    assert options.ridge is not None
    problem = LeastSquaresMerge(options.ridge, device)
    for task in prepared.tasks:
        covariance = task.statistics.covariance_of(group[0])
        if covariance is not None:
            check_covariance(covariance, f"{task.source}: the covariance of '{group[0]}'")
            deltas = {module: task.deltas[module].read() for module in group if module in task.deltas}
            problem.add(covariance, deltas, task.weight)
    return problem.solve(options.rank, options.dtype, bool(options.gate_lora))


def _fingerprints(prepared: PreparedMerge, module: str, merged: MergedDelta) -> dict[str, list[float]]:
    """By task, of its block of the merged weights, or of all of them where they have no blocks."""
    found, start = {}, 0
    for task in prepared.tasks:
        if module in task.deltas:
            end = start + task.deltas[module].rank
            block = slice(start, end) if merged.stacked else slice(None)
            found[task.name] = weight_fingerprint(merged.A[block], merged.B[:, block])
            start = end
    return found


def _residuals(prepared: PreparedMerge, module: str, merged: MergedDelta) -> dict[str, float]:
    """`relative_residuals` by task that trained a layer; without those whose inputs nobody measured there."""
    tasks = [task for task in prepared.tasks if module in task.deltas]
    deltas = [LowRankDelta(A=task.deltas[module].rows(), B=task.deltas[module].columns()) for task in tasks]
    covariances = [task.statistics.covariance_of(module) for task in tasks]
    found = relative_residuals(merged, list(zip(deltas, covariances)))
    return {task.name: residual for task, residual in zip(tasks, found) if not math.isnan(residual)}


def mean_residuals(records: Mapping[str, LayerRecord]) -> dict[str, float]:
    """By task the mean over layers of what merging costs it; four digits are kept."""
    by_task: dict[str, list[float]] = {}
    for record in records.values():
        for task, residual in record.residuals.items():
            by_task.setdefault(task, []).append(residual)
    return {task: float(f"{math.fsum(found) / len(found):.4g}") for task, found in by_task.items()}
