"""Merging a group of layers by another method than LPM: what it is given, and how its result becomes a LoRA pair."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra.covariance import Covariance
from ..algebra.lpm import LARGEST_ROUNDING_LOSS, LowRankDelta, MergedDelta, rounded_deltas
from ..algebra.reduction import compress, nearest_of_rank, orthonormal, padded, rounding_loss
from ..methods import LayerTask, MergeMethod
from .prepare import PreparedMerge
from .reading import GroupInputs


def merge_by_method(prepared: PreparedMerge, inputs: GroupInputs) -> dict[str, MergedDelta]:
    """The merged delta of each layer of a group, at the merge's rank and in its dtype.

    Methods may wait for a GPU as they like; for what is done here it is waited once a layer, and once at the end.
    """
    method = prepared.options.merge_method
    assert method is not None
    layers = {}
    for module in inputs.layers:
        everyone = [
            _layer_task(task.weight, own.get(module), prepared.shape_of(module), covariance, method, inputs.device)
            for task, own, covariance in zip(prepared.tasks, inputs.deltas, inputs.covariances)
        ]
        tasks = [task for task in everyone if task is not None]
        B = torch.cat([task.delta.B for task in tasks], dim=1)
        heard = [task for task in tasks if task.weight > 0]
        if any(task.delta.A.shape[0] > 0 for task in heard):
            result = method.merge(heard, module)
        else:  # no task that counts has trained it
            result = LowRankDelta(A=B.new_zeros(0, prepared.shape_of(module)[1]), B=B[:, :0])
        A, B_merged = _of_rank(result, prepared.rank_of(module), prepared.options.dtype)
        stacked = B_merged.shape == B.shape and bool((B_merged == B).all())
        layers[module] = MergedDelta(A, B_merged, stacked)
    return rounded_deltas(layers, prepared.options.dtype)


def _layer_task(
    weight: float,
    delta: LowRankDelta | None,
    shape: tuple[int, int],
    covariance: Covariance | None,
    method: MergeMethod,
    device: torch.device,
) -> LayerTask | None:
    """A task's part in a layer; `None` where the method needs a covariance and it was not measured."""
    if method.needs_covariances and covariance is None:
        return None
    if delta is None:
        out, width = shape
        A, B = (torch.zeros(size, dtype=torch.float32, device=device) for size in ((0, width), (out, 0)))
        delta = LowRankDelta(A=A, B=B)
    return LayerTask(delta, weight, covariance if method.needs_covariances else None)


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
