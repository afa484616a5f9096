"""Merging a group of layers by another method than LPM: what it is given, and how its result becomes a LoRA pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.lpm import LARGEST_ROUNDING_LOSS, LowRankDelta, MergedDelta, rounded_delta
from ..algebra.reduction import compress, nearest_of_rank, orthonormal, padded, rounding_loss
from ..files.adapter import TaskAdapter
from ..files.stored_covariance import check_covariance
from ..methods import LayerTask, MergeMethod
from .prepare import PreparedMerge


def merge_by_method(
    prepared: PreparedMerge, group: Sequence[str], device: str | torch.device
) -> dict[str, MergedDelta]:
    """The merged delta of each layer of a group, at the merge's rank and in its dtype."""
    method = prepared.options.merge_method
    assert method is not None
    merged = {}
    for module in group:
        shape = prepared.shape_of(module)
        everyone = [_layer_task(task, module, shape, method, device) for task in prepared.tasks]
        tasks = [task for task in everyone if task is not None]
        B = torch.cat([task.delta.B for task in tasks], dim=1)
        heard = [task for task in tasks if task.weight > 0]
        if any(task.delta.A.shape[0] > 0 for task in heard):
            result = method.merge(heard, module)
        else:  # no task that counts has trained it
            result = LowRankDelta(A=B.new_zeros(0, shape[1]), B=B[:, :0])
        A, B_merged = _of_rank(result, prepared.rank_of(module), prepared.options.dtype)
        stacked = B_merged.shape == B.shape and bool((B_merged == B).all())
        merged[module] = rounded_delta(module, A, B_merged, prepared.options.dtype, stacked)
    return merged


def _layer_task(
    task: TaskAdapter, module: str, shape: tuple[int, int], method: MergeMethod, device: str | torch.device
) -> LayerTask | None:
    """A task's part in a layer; `None` where the method needs a covariance and it was not measured."""
    covariance = task.statistics.covariance_of(module) if method.needs_covariances else None
    if method.needs_covariances:
        if covariance is None:
            return None
        check_covariance(covariance, f"{task.source}: the covariance of '{module}'")
    if module in task.deltas:
        read = task.deltas[module].read()
        delta = LowRankDelta(A=read.A.to(device), B=read.B.to(device))
    else:
        out, width = shape
        delta = LowRankDelta(
            *(torch.zeros(size, dtype=torch.float32, device=device) for size in ((0, width), (out, 0)))
        )
    return LayerTask(delta, task.weight, covariance)


def _of_rank(result: LowRankDelta | Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`A` and `B` of the rank: the nearest in the Frobenius norm if the result has more, zeros if it has less."""
    if isinstance(result, Tensor):
        return nearest_of_rank(result, rank)
    A, B = result.A.double(), result.B
    if A.shape[0] > rank:
        return compress(A, B, A, rank)
    if rounding_loss(A, B, dtype) > LARGEST_ROUNDING_LOSS[dtype]:
        A, B = orthonormal(A, B)
    return padded(A, B, rank)
