"""Covariances (second moments) of layer inputs, `C = E[x xᵀ]`: whole, or a low-rank factor and an even remainder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor


class InvalidCovarianceError(ValueError):
    """The numbers are no covariance: not finite, not symmetric, or negative in some direction."""


@dataclass(frozen=True)
class Covariance(ABC):
    """The second moment `C = G + ρ I` of a linear layer's inputs; the subclasses say how `G` is held.

    Args:
        remainder (`float`):
            `ρ ≥ 0`, the energy that every direction has beyond `G`: what truncation discarded, and the ridge.
        tokens (`int`):
            The number of input vectors that were averaged.
    """

    remainder: float
    tokens: int

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        return self  # Immutable, large and shared: copies of a model need no copies of it.

    @property
    @abstractmethod
    def width(self) -> int:
        """The number of input features, `in`."""

    @property
    @abstractmethod
    def trace(self) -> float:
        """`tr C`, the mean squared norm of the inputs."""

    @abstractmethod
    def dense(self) -> Tensor:
        """`C` as one float64 matrix of shape `(in, in)`."""

    @abstractmethod
    def check(self) -> None:
        """Raise `InvalidCovarianceError` if this is not a covariance: NaN, Inf, asymmetric or negative."""

    def with_ridge(self: Self, ridge: float) -> Self:
        """`C + λ · mean(diag C) · I`: the relative ridge `λ` inside the covariance."""
        return replace(self, remainder=self.remainder + ridge * self.trace / self.width)


Self = TypeVar("Self", bound=Covariance)


@dataclass(frozen=True)
class DenseCovariance(Covariance):
    """A covariance held whole: `G` is a symmetric matrix of shape `(in, in)`, float64 as collected."""

    matrix: Tensor

    @property
    def width(self) -> int:
        return self.matrix.shape[0]

    @property
    def trace(self) -> float:
        return self.matrix.diagonal().double().sum().item() + self.remainder * self.width

    def dense(self) -> Tensor:
        matrix = self.matrix.double().clone()
        matrix.diagonal().add_(self.remainder)
        return matrix

    def check(self) -> None:
        if self.matrix.dim() != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise InvalidCovarianceError(f"it has shape {tuple(self.matrix.shape)}, not (in, in)")
        _check_finite(self.matrix, self.remainder)
        matrix = self.matrix.double()
        scale = matrix.abs().max().item()
        # Rounding of the stored dtype, not of float64, bounds how symmetric and how non-negative it can be.
        slack = 16 * torch.finfo(self.matrix.dtype).eps * scale * math.sqrt(self.width)
        if (matrix - matrix.T).abs().max().item() > slack:
            raise InvalidCovarianceError("it is not symmetric")
        shifted = matrix.clone()
        shifted.diagonal().add_(self.remainder + slack)
        if scale > 0 and torch.linalg.cholesky_ex(shifted).info.item() != 0:
            raise InvalidCovarianceError("it is negative in some direction (a mean of x xᵀ cannot be)")


@dataclass(frozen=True)
class LowRankCovariance(Covariance):
    """A covariance of bounded rank plus a remainder: `C = Sᵀ S + ρ I` with the factor `S` of shape `(k, in)`."""

    factor: Tensor

    @property
    def width(self) -> int:
        return self.factor.shape[1]

    @property
    def trace(self) -> float:
        return self.factor.double().square().sum().item() + self.remainder * self.width

    def dense(self) -> Tensor:
        factor = self.factor.double()
        matrix = factor.T @ factor
        matrix.diagonal().add_(self.remainder)
        return matrix

    def check(self) -> None:
        if self.factor.dim() != 2:
            raise InvalidCovarianceError(f"its factor has shape {tuple(self.factor.shape)}, not (k, in)")
        _check_finite(self.factor, self.remainder)


@dataclass(frozen=True)
class CovarianceSum(Covariance):
    """A weighted sum of covariances, `Σ_t w_t C_t + ρ I`: the `R` of a merge. The parts are `(w_t, C_t)`."""

    parts: tuple[tuple[float, Covariance], ...]

    @property
    def width(self) -> int:
        return self.parts[0][1].width

    @property
    def trace(self) -> float:
        return sum(weight * part.trace for weight, part in self.parts) + self.remainder * self.width

    def dense(self) -> Tensor:
        matrix = self.remainder * torch.eye(self.width, dtype=torch.float64)
        for weight, part in self.parts:
            matrix.add_(part.dense(), alpha=weight)
        return matrix

    def check(self) -> None:
        for _, part in self.parts:
            part.check()


def _check_finite(tensor: Tensor, remainder: float) -> None:
    if not torch.isfinite(tensor).all():
        raise InvalidCovarianceError("it holds NaN or Inf")
    if not math.isfinite(remainder) or remainder < 0:
        raise InvalidCovarianceError(f"its remainder is {remainder}; a mean of squares is finite and not negative")


class CovarianceAccumulator:
    """Sums `x xᵀ` over batches and gives their mean.

    Products and sums are float64: float32 products leave noise of 1e-7 of the *largest* eigenvalue in directions that
    no token reached, far above a small ridge, and the merge divides by those directions.

    Args:
        width (`int`): The number of input features.
        device (`torch.device`): Where to accumulate; that of the activations is the natural choice.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add the rows of `inputs`, shape `(tokens, in)`, any floating dtype."""
        rows = inputs.detach().to(device=self.total.device, dtype=torch.float64)
        self.total.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]

    def result(self) -> DenseCovariance:
        """The mean of `x xᵀ` over all rows so far, on the CPU; zero if there were none."""
        # addmm is symmetric up to rounding; make it so to the bit, as it is stored and checked.
        mean = (self.total + self.total.T).div_(2 * max(self.tokens, 1))
        return DenseCovariance(remainder=0.0, tokens=self.tokens, matrix=mean.cpu())


def truncate(covariance: Covariance, energy: float, dtype: torch.dtype = torch.float32) -> LowRankCovariance:
    """Keep the eigen-directions that hold a share of the energy, and spread the rest evenly (MAny*).

    With eigenvalues `σ_1 ≥ σ_2 ≥ …` the smallest `k` with `Σ_{i≤k} σ_i ≥ energy · tr C` is kept, the remainder is the
    mean of the discarded eigenvalues, and the kept eigenvalues and the trace stay exact. Plain truncation, without the
    remainder, lets the merge extrapolate freely where a task had little energy.

    Args:
        covariance ([`Covariance`]): What to truncate, width `in`.
        energy (`float`): The share of `tr C` to keep, in (0, 1].
        dtype (`torch.dtype`): The dtype of the factor; the eigendecomposition is float64.

    Returns:
        [`LowRankCovariance`]: `C ≈ Sᵀ S + ρ I`, `S` of shape `(k, in)` and in `dtype`.
    """
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"`energy` is the share of the variance to keep, in (0, 1], but it is {energy}.")
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance.dense())
    eigenvalues, eigenvectors = eigenvalues.flip(0), eigenvectors.flip(1)
    # Below what float64 resolves beside the largest, an eigenvalue is rounding, and may even be negative.
    resolution = covariance.width * torch.finfo(torch.float64).eps * eigenvalues[0]
    eigenvalues = torch.where(eigenvalues > resolution, eigenvalues, 0.0)
    total = eigenvalues.sum()
    kept = int(torch.searchsorted(eigenvalues.cumsum(0), energy * total).item()) + 1 if total > 0 else 0
    kept = min(kept, covariance.width)
    discarded = eigenvalues[kept:]
    remainder = discarded.mean().item() if discarded.numel() else 0.0
    scale = (eigenvalues[:kept] - remainder).clamp(min=0.0).sqrt()
    factor = (scale[:, None] * eigenvectors[:, :kept].T).to(dtype)
    return LowRankCovariance(remainder=remainder, tokens=covariance.tokens, factor=factor.contiguous())
