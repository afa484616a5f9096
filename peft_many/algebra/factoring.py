"""Bringing a dense weight change to factored form, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from .lpm import LowRankDelta
from .reduction import nearest_of_rank, of_full_rank

OVERSAMPLING = 8
# What float32 arithmetic in the making of a delta may leave outside its rank, as a share of its norm.
LARGEST_REMAINDER = 1e-5


class RankError(ValueError):
    """A delta has directions beyond the rank that it was said to have."""


def factored(delta: Tensor, rank: int) -> LowRankDelta:
    """`B A` with the dense delta as its value, to the rounding of float32.

    The delta is float64, and its rank is known not to exceed `rank`. One of full rank needs no decomposition: the
    identity is one of its factors. Of one of lower rank, a few more random combinations of its columns than it has
    rank span all of them (Halko, Martinsson and Tropp 2011), so that no SVD of its size is needed either. What is left
    over is measured.
    """
    out, width = delta.shape
    if rank >= min(out, width):
        return LowRankDelta(*of_full_rank(delta.float()))
    if rank + OVERSAMPLING >= min(out, width):
        A, B = nearest_of_rank(delta, rank)
    else:
        generator = torch.Generator().manual_seed(0)
        mixed = torch.randn(width, rank + OVERSAMPLING, generator=generator, dtype=torch.float64).to(delta.device)
        span, _ = torch.linalg.qr(delta @ mixed)
        A, within = nearest_of_rank(span.T @ delta, rank)
        B = span @ within
    norm, remainder = delta.norm().item(), (delta - B @ A).norm().item()
    if remainder > LARGEST_REMAINDER * norm:
        raise RankError(f"{remainder / norm:.1e} of its norm lies beyond the rank {rank}")
    return LowRankDelta(A=A.float(), B=B.float())
