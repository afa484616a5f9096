"""Eigen-directions of a covariance, and how many of them are worth keeping."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .covariance import Covariance, LowRankCovariance


def truncate(
    covariance: Covariance,
    energy: float,
    dtype: torch.dtype = torch.float32,
    *,
    rank: int | None = None,
) -> LowRankCovariance:
    """Keep the eigen-directions that hold a share of the energy, and spread the rest evenly (MAny*).

    With eigenvalues `σ_1 ≥ σ_2 ≥ …` the smallest `k` with `Σ_{i≤k} σ_i ≥ energy · tr C` is kept, at most `rank`; the
    remainder is the mean of the discarded eigenvalues, and the kept eigenvalues and the trace stay exact. Plain
    truncation, without the remainder, lets the merge extrapolate freely where a task had little energy.

    Args:
        covariance ([`Covariance`]): What to truncate, width `in`.
        energy (`float`): The share of `tr C` to keep, in (0, 1].
        dtype (`torch.dtype`): The dtype of the factor; the eigendecomposition is float64.
        rank (`int`, *optional*): The most directions to keep.

    Returns:
        [`LowRankCovariance`]: `C ≈ Sᵀ S + ρ I`, `S` of shape `(k, in)` and in `dtype`.
    """
    return eigen_directions(covariance).truncate(energy, dtype, rank=rank)


@dataclass(frozen=True)
class Spectrum:
    """The leading eigenvalues and eigen-directions of a covariance, and the energy of all others together.

    Args:
        values (`torch.Tensor`): Shape `(k,)`, float64, falling.
        directions (`torch.Tensor`): Shape `(k, in)`, float64, orthonormal rows.
        rest (`float`): The sum of all other eigenvalues.
        tokens (`int`): As in [`Covariance`].
    """

    values: Tensor
    directions: Tensor
    rest: float
    tokens: int

    @property
    def trace(self) -> float:
        """`tr C`."""
        return self.values.sum().item() + self.rest

    def remainder(self, kept: int) -> float:
        """The mean of the eigenvalues beyond the first `kept`."""
        others = self.directions.shape[1] - kept
        return (self.values[kept:].sum().item() + self.rest) / others if others else 0.0

    def truncate(
        self, energy: float, dtype: torch.dtype = torch.float32, *, rank: int | None = None
    ) -> LowRankCovariance:
        """As [`truncate`]."""
        if not 0.0 < energy <= 1.0:
            raise ValueError(f"`energy` is the share of the variance to keep, in (0, 1], but it is {energy}.")
        total = self.trace
        kept = int(torch.searchsorted(self.values.cumsum(0), energy * total).item()) + 1 if total > 0 else 0
        return self.keep(kept if rank is None else min(kept, rank), dtype)

    def keep(self, kept: int, dtype: torch.dtype = torch.float32) -> LowRankCovariance:
        """The covariance with its first `kept` eigenvalues, and the others' mean; the factor in `dtype`."""
        kept = min(kept, len(self.values))
        while kept and self.values[kept - 1] < self.remainder(kept) * (1 - 1e-9):
            kept -= 1  # below the mean of those after it: a sketch underestimates its last directions
        remainder = self.remainder(kept)
        scale = (self.values[:kept] - remainder).clamp(min=0.0).sqrt()
        factor = (scale[:, None] * self.directions[:kept]).to(dtype)
        return LowRankCovariance(remainder=remainder, tokens=self.tokens, factor=factor.contiguous())


def eigen_directions(covariance: Covariance) -> Spectrum:
    """The eigendecomposition in float64: in the span of the factor if it has fewer rows than columns, else whole."""
    if isinstance(covariance, LowRankCovariance) and covariance.rank < covariance.width:
        rows = covariance.rows()
        values, mixing = torch.linalg.eigh(rows @ rows.T)
        values, mixing = _falling(values, mixing, covariance.width)
        seen = int((values > 0).sum().item())
        values, directions = values[:seen], mixing.T[:seen] @ rows / values[:seen, None].sqrt()
        rest = covariance.remainder * (covariance.width - seen)
        return Spectrum(values + covariance.remainder, directions, rest, covariance.tokens)
    values, vectors = torch.linalg.eigh(covariance.dense())
    values, vectors = _falling(values, vectors, covariance.width)
    return Spectrum(values, vectors.T, 0.0, covariance.tokens)


def _falling(values: Tensor, vectors: Tensor, width: int) -> tuple[Tensor, Tensor]:
    values, vectors = values.flip(0), vectors.flip(1)
    # Below what float64 resolves beside the largest, an eigenvalue is rounding, and may even be negative.
    return torch.where(values > width * torch.finfo(torch.float64).eps * values[:1], values, 0.0), vectors
