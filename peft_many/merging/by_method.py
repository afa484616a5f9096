"""Merging a group of layers by another method than LPM: what it is given, and how its result becomes a LoRA pair."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra.lpm import LARGEST_ROUNDING_LOSS, LowRankDelta, MergedDelta, rounded_deltas
from ..algebra.reduction import compress, nearest_of_rank, orthonormal, padded, rounding_loss
from ..methods import LayerTask
from ..methods.base import trained
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
        out, width = prepared.shape_of(module)
        nothing = LowRankDelta(
            A=torch.zeros(0, width, dtype=torch.float32, device=inputs.device),
            B=torch.zeros(out, 0, dtype=torch.float32, device=inputs.device),
        )
        tasks = [  # a method that needs a covariance leaves out those of which none was measured
            LayerTask(own.get(module, nothing), task.weight, covariance if method.needs_covariances else None)
            for task, own, covariance in zip(prepared.tasks, inputs.deltas, inputs.covariances)
            if covariance is not None or not method.needs_covariances
        ]
        heard = [task for task in tasks if task.weight > 0]
        result = method.merge(heard, module) if trained(heard) else nothing
        A, B = _of_rank(result, prepared.rank_of(module), prepared.options.dtype)
        blocks = torch.cat([task.delta.B for task in tasks], dim=1)
        stacked = B.shape == blocks.shape and bool((blocks == B).all())
        layers[module] = MergedDelta(A, B, stacked)
    return rounded_deltas(layers, prepared.options.dtype)


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
