"""Features of a task's images or instructions, summed up as they come, and the statistics that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..algebra.devices import float64_device
from ..algebra.spectrum import Truncation
from ..algebra.spread import centred
from ..algebra.total import FiniteCheck
from ..files.processes import Processes
from ..files.stored_features import FeatureStatistics

# Images or instructions of a task whose features are kept, to see how they differ; the prototype is of all.
MOST_KEPT = 1024
# How much is kept of the spread of a task's images, and of its instructions.
SPREAD = Truncation(rank=256, energy=1.0)
SPREAD_OF_INSTRUCTIONS = Truncation(rank=32, energy=1.0)


@dataclass
class PooledFeatures:
    """Features that were seen."""

    total: Tensor  # their sum, (d,), float64
    count: int = 0
    kept: list[Tensor] = field(default_factory=list)  # the first `MOST_KEPT`, in parts of (n, d), float32

    @classmethod
    def none_of(cls, like: Tensor) -> PooledFeatures:
        """Nothing yet, for rows such as those of shape `(n, d)`."""
        return cls(torch.zeros(like.shape[-1], dtype=torch.float64, device=float64_device(like.device)))

    def add(self, pooled: Tensor) -> None:
        """Add rows of shape `(n, d)`."""
        pooled = pooled.detach().to(self.total.device)
        self.total = self.total + pooled.sum(0, dtype=torch.float64)
        self.kept.append(pooled[: max(0, MOST_KEPT - self.count)].float())
        self.count += len(pooled)

    def on_cpu(self) -> PooledFeatures:
        """The same on the CPU."""
        return PooledFeatures(self.total.cpu(), self.count, [part.cpu() for part in self.kept])


def finished(found: Mapping[str, PooledFeatures], message: str) -> dict[str, PooledFeatures]:
    """The same on the CPU, or a `RuntimeError` with the message, where `{}` is a name, if one holds NaN or Inf."""
    FiniteCheck({name: one.total.sum() for name, one in found.items()}, message).refuse()
    return {name: one.on_cpu() for name, one in found.items()}


def gather_features(
    found: Mapping[str, PooledFeatures], processes: Processes, truncation: Truncation = SPREAD
) -> dict[str, FeatureStatistics]:
    """The features of all processes together, by name."""
    everyone = processes.every(lambda: dict(found))
    gathered = {}
    for name in dict.fromkeys(name for one in everyone for name in one):
        parts = [one[name] for one in everyone if name in one]
        count = sum(part.count for part in parts)
        prototype = (torch.stack([part.total for part in parts]).sum(0) / count).float()
        rows = torch.cat([kept for part in parts for kept in part.kept])
        spread = truncation.apply(centred(rows)) if len(rows) > 1 else None
        gathered[name] = FeatureStatistics(prototype, spread, count)
    return gathered
