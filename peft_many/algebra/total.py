"""Sums over many batches, as exact as a device can keep them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .devices import Asked, float64_device


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


class FiniteCheck(Asked):
    """Asks whether numbers are finite, all together and as they are now, without waiting for a device.

    Args:
        numbers (`Mapping[str, Tensor]`): By name, of one entry each.
        message (`str`): Of the error, with `{}` for the name of the first that is not.
    """

    def __init__(self, numbers: Mapping[str, Tensor], message: str) -> None:
        super().__init__(list(numbers.values()))
        self._names, self._message = list(numbers), message

    def refuse(self) -> None:
        """A `RuntimeError` if one was NaN or Inf."""
        for name, (number,) in zip(self._names, self.read()):
            if not math.isfinite(number):
                raise RuntimeError(self._message.format(name))
