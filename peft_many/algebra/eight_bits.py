"""Matrices in eight bits an entry: half of what float16 takes, each entry a 254th of its row's range off at most.

Columns are brought to one size first: a language model has input channels that are a hundred or a thousand times as
large as the others, and would give these all the bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST = 127
_EXPONENTS = (-126, 127)  # of float32, but for the smallest numbers


class Scales(NamedTuple):
    """What an int8 matrix of shape `(k, n)` is multiplied by."""

    rows: Tensor  # each row's factor, (k,), float32
    columns: Tensor  # each column's power of two, (n,), int8


def to_eight_bits(matrix: Tensor) -> tuple[Tensor, Scales]:
    """Round each entry to one of 255 evenly spaced values, up to the largest of its row in columns of one size."""
    exact = matrix.double()
    sizes = exact.square().sum(dim=0).sqrt()
    exponents = torch.where(sizes > 0, sizes, 1.0).log2().round().clamp(*_EXPONENTS)
    even = torch.ldexp(exact, -exponents)
    # Kept in float32, and rounded with what is kept.
    rows = (even.abs().amax(dim=1) / _LARGEST).float() if exact.numel() else exact.new_zeros(len(exact)).float()
    steps = rows.double()[:, None]
    numbers = torch.where(steps > 0, even / steps, 0.0).round().clamp(-_LARGEST, _LARGEST)
    return numbers.to(torch.int8), Scales(rows, exponents.to(torch.int8))


def from_eight_bits(numbers: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
    """The matrix of these numbers and scales, shape `(k, n)`."""
    return torch.ldexp(numbers.to(dtype) * scales.rows.to(dtype)[:, None], scales.columns.to(dtype))
