"""Merging the layers of one group, which share their input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.lpm import LeastSquaresMerge, MergedDelta, SingularMergeError
from ..files.statistics import check_covariance, weight_fingerprint
from ..files.stored_delta import KEY_PREFIX, TASK_WEIGHT, UnmergeableAdapterError
from .by_method import merge_by_method
from .interference import layer_residuals
from .prepare import PreparedMerge


@dataclass(frozen=True)
class MergedGroup:
    """What merging one group of layers gave.

    Args:
        tensors (`dict[str, torch.Tensor]`): For the weights file, by key.
        record (`dict[str, Any]`): What the merge's statistics must know of it.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def merge_group(plan: PreparedMerge, group: Sequence[str], device: str | torch.device) -> MergedGroup:
    """Merge layers that share their input; what was read for it is given back."""
    merged = merged_deltas(plan, group, device)
    record = {
        "stacked": {module: delta.stacked for module, delta in merged.items()},
        "fingerprints": {module: _fingerprints(plan, module, delta) for module, delta in merged.items()},
        "residuals": {module: layer_residuals(plan, module, delta) for module, delta in merged.items()},
    }
    plan.release()
    return MergedGroup(tensors_of(merged), record)


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
        covariance = task.statistics.covariances.get(group[0])
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
