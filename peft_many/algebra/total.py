"""Sums over many batches, as exact as a device can keep them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .devices import float64_device, numbers_of


class Total:
    """A sum of float32 tensors of one shape: in float64, or, on devices without it, in two float32 parts.

    Apple's GPUs ("mps") have no float64. There the second part holds what additions to the first one rounded off
    (Knuth's two-sum), so that both together have 48 bits, where float64 has 53.
    """

    def __init__(self, *shape: int, device: torch.device) -> None:
        is_exact = float64_device(device) == device
        self.sum = torch.zeros(shape, dtype=torch.float64 if is_exact else torch.float32, device=device)
        self.lost = None if is_exact else torch.zeros_like(self.sum)

    def add(self, part: Tensor, start: int = 0) -> None:
        """Add a tensor, which may be some rows only, from `start` on."""
        old = self.sum.narrow(0, start, len(part))
        if self.lost is None:
            old += part
            return
        new = old + part
        added = new - old
        self.lost.narrow(0, start, len(part)).add_((old - (new - added)) + (part - added))
        old.copy_(new)

    def value(self) -> Tensor:
        """The sum in float64, on the CPU if the device has none."""
        return self.sum if self.lost is None else self.sum.cpu().double() + self.lost.cpu().double()


def not_finite(numbers: Mapping[str, Tensor]) -> str | None:
    """The name of the first number that is NaN or Inf; they are read together, once from each device."""
    known = zip(numbers, numbers_of(list(numbers.values())))
    return next((name for name, (number,) in known if not math.isfinite(number)), None)
