"""What a low-rank delta loses where it is computed in half precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .lpm import LARGEST_ROUNDING_LOSS

# Of a delta in which nothing cancels the inputs, both factors and both products are rounded, which loses 3.3e-3 in
# bfloat16 and 4e-4 in float16; where blocks cancel, it may be twice as much.
LARGEST_LOSS = {dtype: 2 * LARGEST_ROUNDING_LOSS[dtype] for dtype in (torch.float16, torch.bfloat16)}

_PROBES = 16  # the loss is a mean over as many inputs, and within about a fifth of that over all


def loses_little(A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether `B A x` in half precision is off by little more than that rounds anyway; a scalar where the factors are.

    Measured on random inputs: the blocks of a merge may be large and cancel, and float16 overflows. Not so of deltas
    that are zero, whose weights may still be to come.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBES, A.shape[1], generator=generator).to(A.device, dtype)
    exact = linear(linear(x.float(), A.float()), B.float())
    rounded = linear(linear(x, A.to(dtype)), B.to(dtype))
    return (rounded.float() - exact).norm() < LARGEST_LOSS[dtype] * exact.norm()
