"""Eigen-directions of a covariance, and which of them are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from .covariance import Covariance, LowRankCovariance
from .lpm import LowRankDelta

DEFAULT_RANK = 256
DEFAULT_ENERGY = 0.9999
# A sketch follows this many directions more than are kept, as a share; its last ones are inaccurate.
OVERSAMPLING = 0.25


@dataclass(frozen=True)
class Spectrum:
    """The leading eigenvalues and eigen-directions of a covariance, and the energy of all others together."""

    values: Tensor  # (k,), float64, falling, on the CPU, where it is decided what is kept
    directions: Tensor  # (k, in), float64, orthonormal rows, wherever they were found
    rest: float  # the sum of all other eigenvalues

    @property
    def trace(self) -> float:
        """`tr C`."""
        return self.values.sum().item() + self.rest

    def remainder(self, kept: int) -> float:
        """The mean of the eigenvalues beyond the first `kept`."""
        others = self.directions.shape[1] - kept
        return (self.values[kept:].sum().item() + self.rest) / others if others else 0.0

    def leading(self, rank: int) -> Spectrum:
        """The first `rank` directions apart, and all others together."""
        rest = self.rest + self.values[rank:].sum().item()
        return Spectrum(self.values[:rank], self.directions[:rank], rest)

    def keep(self, kept: int, dtype: torch.dtype = torch.float32) -> LowRankCovariance:
        """The covariance `Sᵀ S + ρ I` with its first `kept` eigenvalues, and for `ρ` the mean of the others (MAny*).

        Fewer are kept where the spectrum has fewer. Kept eigenvalues and the trace stay exact. Plain truncation,
        without the remainder, lets the merge extrapolate freely where a task had little energy.
        """
        kept = min(kept, len(self.values))
        while kept and self.values[kept - 1] < self.remainder(kept) * (1 - 1e-9):
            kept -= 1  # below the mean of those after it: a sketch underestimates its last directions
        remainder = self.remainder(kept)
        scale = (self.values[:kept] - remainder).clamp(min=0.0).sqrt()
        factor = (scale.to(self.directions.device)[:, None] * self.directions[:kept]).to(dtype)
        return LowRankCovariance(remainder=remainder, factor=factor.contiguous(), is_orthogonal=True)

    def rank_of_energy(self, energy: float) -> int:
        """The smallest `k` with `σ_1 + … + σ_k ≥ energy · tr C`; one more than are known if these do not suffice."""
        total = self.trace
        return int(torch.searchsorted(self.values.cumsum(0), energy * total).item()) + 1 if total > 0 else 0

    def rank_within(self, deltas: Iterable[LowRankDelta], error: float) -> int:
        """The fewest directions that keep the expected error of a merged delta within a budget, or all.

        Truncation changes `C_t` by `E`, and with it, to first order, the merged delta by `(ΔW_t − ΔW*) E R⁻¹`, which
        on the tasks' inputs weighs at most `‖(ΔW_t − ΔW*) E C_t^-½‖`. A direction `v_i` with eigenvalue `σ_i`,
        replaced by the remainder `ρ_k`, has its share `(σ_i − ρ_k)² / max(σ_i, ρ_k)` in it, times how much
        `ΔW_t − ΔW*` does there. The other tasks are not known yet; they are taken to do as much as this one, evenly in
        all directions. Keeping energy instead asks how large an input is, but not whether any delta reads it.

        The budget is a share of `‖ΔW_t C_t^½‖`, the size of the delta's outputs, for the `ΔW_t` of each layer that has
        this input; where there is none, as if one read all directions alike.
        """
        followed, others = len(self.values), self.directions.shape[1] - len(self.values)
        values = torch.cat([self.values, self.values.new_tensor([self.remainder(followed)])])
        counts = torch.ones(followed + 1, dtype=torch.float64)
        counts[-1] = others
        readings = [_reading(delta, self) for delta in deltas]
        reading = counts * torch.stack(readings).cpu() if readings else counts[None]
        # Row `k` is for keeping the first `k`: what each further direction then loses.
        remainders = torch.tensor([self.remainder(kept) for kept in range(followed)], dtype=torch.float64)[:, None]
        shares = (values - remainders).square() / torch.maximum(values, remainders).clamp(min=1e-300)
        lost = shares.triu() @ reading.T / (reading @ values).clamp(min=1e-300)
        within = (lost.amax(dim=1) <= error**2).nonzero()
        return int(within[0]) if len(within) else followed


def _reading(delta: LowRankDelta, spectrum: Spectrum) -> Tensor:
    """`‖ΔW v_i‖²` for each direction and the mean of all others, and the same again for tasks yet unknown."""
    A, B = (half.to(spectrum.directions) for half in (delta.A, delta.B))
    gram = B.T @ B
    seen = A @ spectrum.directions.T
    own = ((gram @ seen) * seen).sum(0)
    whole = ((gram @ A) * A).sum()
    others = spectrum.directions.shape[1] - len(own)
    beyond = ((whole - own.sum()) / max(others, 1)).clamp(min=0.0)
    return torch.cat([own, beyond[None]]) + whole / spectrum.directions.shape[1]


def eigen_directions(covariance: Covariance) -> Spectrum:
    """The eigendecomposition in float64: in the span of the factor if it has fewer rows than columns, else whole."""
    if covariance.rank < covariance.width:
        rows = covariance.factor_rows()
        if isinstance(covariance, LowRankCovariance) and covariance.is_orthogonal:  # nothing is left to find
            norms = torch.linalg.vector_norm(rows, dim=1)
            values, directions = norms.square(), rows / norms[:, None]
        else:
            values, directions = decomposed(rows)
        values = _without_rounding(values.cpu(), covariance.width)
        seen = int((values > 0).sum().item())
        rest = covariance.remainder * (covariance.width - seen)
        return Spectrum(values[:seen] + covariance.remainder, directions[:seen], rest)
    values, vectors = torch.linalg.eigh(covariance.dense())
    return Spectrum(_without_rounding(values.flip(0).cpu(), covariance.width), vectors.flip(1).T, 0.0)


def decomposed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and eigen-directions of `Zᵀ Z` by rows `Z`, or a batch of them, `(…, k, in)`, `k ≤ in`.

    As they are rounded: values of zero may be negative, and then have no direction.
    """
    values, mixing = torch.linalg.eigh(rows @ rows.mT)
    values, mixing = values.flip(-1), mixing.flip(-1)
    lengths = values.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return values, (mixing / lengths[..., None, :]).mT @ rows


def _without_rounding(values: Tensor, width: int) -> Tensor:
    # Below what float64 resolves beside the largest, an eigenvalue is rounding, and may even be negative.
    return torch.where(values > width * torch.finfo(torch.float64).eps * values[:1], values, 0.0)


@dataclass(frozen=True)
class Truncation:
    """How much of a covariance is kept, and in what."""

    rank: int | None = None  # the most directions; see `most`
    energy: float = DEFAULT_ENERGY  # the share of tr C to keep, in (0, 1], as far as `rank` allows
    error_budget: float | None = None  # choose by `Spectrum.rank_within`, and not by `energy`
    dtype: torch.dtype = torch.float16  # or int8

    def __post_init__(self) -> None:
        if not (isinstance(self.energy, Real) and 0.0 < self.energy <= 1.0):
            raise ValueError(f"`energy` is a share, in (0, 1], but it is {self.energy!r}.")
        if self.rank is not None and not (isinstance(self.rank, Integral) and self.rank >= 1):
            raise ValueError(f"`rank` must be at least 1, and a whole number, but it is {self.rank!r}.")
        if self.error_budget is not None and not (isinstance(self.error_budget, Real) and self.error_budget > 0):
            raise ValueError(f"`error_budget` must be positive, but it is {self.error_budget!r}.")
        if self.dtype not in (torch.float16, torch.int8):
            raise ValueError(f"`dtype` must be torch.float16 or torch.int8, but it is {self.dtype}.")
        if self.most is None and self.dtype == torch.int8:
            raise ValueError(
                "`energy=1.0` keeps whole matrices in float64; `dtype=torch.int8` needs a `rank` or less energy."
            )

    @property
    def most(self) -> int | None:
        """The most directions that are kept; `None` if covariances are kept whole."""
        if self.rank is None and self.energy == 1.0 and self.error_budget is None:
            return None
        return self.rank or DEFAULT_RANK

    @property
    def followed(self) -> int | None:
        """How many directions a sketch has to follow for that."""
        return None if self.most is None else self.most + math.ceil(OVERSAMPLING * self.most)

    def apply(self, covariance: Covariance, deltas: Sequence[LowRankDelta] = ()) -> Covariance:
        """The covariance `Sᵀ S + ρ I` with the directions that are worth it, or the one given if all are kept.

        Computed where the covariance is; what is cut is given back on the CPU. An `error_budget` needs the task's
        deltas of the layers with this input.
        """
        if self.most is None:
            return covariance
        spectrum = eigen_directions(covariance)
        if self.error_budget is None:
            kept = spectrum.rank_of_energy(self.energy)
        else:
            kept = spectrum.rank_within(deltas, self.error_budget)
        truncated = spectrum.keep(min(kept, self.most))
        stored = truncated.in_half_precision() if self.dtype == torch.float16 else truncated.in_eight_bits()
        return stored.on(torch.device("cpu"))
