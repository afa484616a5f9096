"""Sums of covariances: as they are, for a merge's `R`, or as one, for inputs that were measured in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .covariance import Covariance, DenseCovariance, LowRankCovariance


@dataclass(frozen=True)
class CovarianceSum(Covariance):
    """A weighted sum of covariances, `Σ_t w_t C_t + ρ I`: the `R` of a merge. The parts are `(w_t, C_t)`."""

    parts: tuple[tuple[float, Covariance], ...]

    @property
    def width(self) -> int:
        return self.parts[0][1].width

    def trace_there(self) -> Tensor:
        total = torch.stack([weight * part.trace_there() for weight, part in self.parts]).sum()
        return total + self.remainder * self.width

    def _moved(self, device: torch.device) -> CovarianceSum:
        return replace(self, parts=tuple((weight, part.on(device)) for weight, part in self.parts))

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": held for i, (_, part) in enumerate(self.parts) for name, held in part.tensors().items()}

    def dense(self) -> Tensor:
        matrix = self.remainder * torch.eye(self.width, dtype=torch.float64)
        for weight, part in self.parts:
            matrix.add_(part.dense(), alpha=weight)
        return matrix

    def product(self, rows: Tensor) -> Tensor:
        return sum((w * part.product(rows) for w, part in self.parts), start=self.remainder * rows.double())

    def check(self) -> None:
        for _, part in self.parts:
            part.check()


def mean_covariance(parts: Sequence[Covariance], counts: Sequence[int]) -> Covariance:
    """The covariance of inputs that were measured in parts: the mean of these, weighted by their counts."""
    whole = max(sum(counts), 1)
    return added_covariances([(count / whole, part) for count, part in zip(counts, parts, strict=True)])


def added_covariances(parts: Sequence[tuple[float, Covariance]]) -> Covariance:
    """`Σ_t f_t C_t` of parts `(f_t, C_t)`, `f_t ≥ 0`, as one covariance; sums are float64.

    By a factor of `Σ_t k_t` rows if all parts have one, else whole.
    """
    remainder = sum(factor * part.remainder for factor, part in parts)
    if all(part.is_factored for _, part in parts):
        rows = torch.cat([factor**0.5 * part.factor_rows() for factor, part in parts])
        return LowRankCovariance(remainder=remainder, factor=rows.float())
    matrix = sum((factor * replace(part, remainder=0.0).dense() for factor, part in parts), torch.zeros(()))
    return DenseCovariance(remainder=remainder, matrix=matrix)
