"""Covariances (second moments) of layer inputs, `C = E[x xᵀ]`: whole, or a low-rank factor and an even remainder."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .devices import has_caches, is_on, moved, numbers_of
from .eight_bits import Scales, from_eight_bits, to_eight_bits

_BLOCK = 256  # rows at the diagonal of a symmetric product, of which both triangles are computed


class InvalidCovarianceError(ValueError):
    """The numbers are no covariance: not finite, not symmetric, or negative in some direction."""


@dataclass(frozen=True)
class Covariance(ABC):
    """The second moment `C = G + ρ I` of a linear layer's inputs; the subclasses say how `G` is held.

    The `remainder` `ρ ≥ 0` is the energy that every direction has beyond `G`: what truncation discarded, and the
    ridge.
    """

    remainder: float

    is_factored: ClassVar[bool] = False  # whether `G` is held by a factor, and not by a matrix of `in × in`

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        return self  # Immutable, large and shared: copies of a model need no copies of it.

    @property
    @abstractmethod
    def width(self) -> int:
        """The number of input features, `in`."""

    @property
    def rank(self) -> int:
        """How many rows `factor_rows` has."""
        return self.width

    @property
    def nbytes(self) -> int:
        """The size of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @functools.cached_property
    def trace(self) -> float:
        """`tr C`, the mean squared norm of the inputs."""
        return self.trace_there().item()

    @abstractmethod
    def trace_there(self) -> Tensor:
        """`tr C`, float64, where the tensors are."""

    def on(self: Self, device: torch.device) -> Self:
        """The same on a device, as it is stored."""
        return self if all(is_on(tensor, device) for tensor in self.tensors().values()) else self._moved(device)

    @abstractmethod
    def _moved(self: Self, device: torch.device) -> Self:
        """The same with its tensors on another device."""

    @abstractmethod
    def dense(self) -> Tensor:
        """`C` as one float64 matrix of shape `(in, in)`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it is held in, by name."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next(iter(self.tensors().values())).device

    def numbers(self) -> dict[str, float]:
        """What else it is made of, by name."""
        return {"remainder": self.remainder}

    def factor_rows(self, device: torch.device | str | None = None) -> Tensor:
        """`S` with `Sᵀ S = G`, shape `(rank, in)`, float64."""
        values, vectors = torch.linalg.eigh(replace(self, remainder=0.0).dense())
        return (vectors * values.clamp(min=0.0).sqrt()).T.to(device)

    def put_rows(self, out: Tensor) -> float:
        """Fill a float64 matrix, `(rank, in)`, with `S / s` as it is stored, and give `s`; `Sᵀ S = G`."""
        out.copy_(self.factor_rows(out.device))
        return 1.0

    def add_to(self, total: Tensor, weight: float) -> None:
        """Add `w C` to a float64 matrix of shape `(in, in)`, to its lower triangle at least."""
        total.add_(self.dense().to(total.device), alpha=weight)

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """`rows · C` in float64, shape `(n, in)` like `rows`, on their device."""

    def moment(self, rows: Tensor) -> Tensor:
        """`X C Xᵀ` of rows `X`, shape `(n, in)`, in float64: the second moment of what `X` makes of the inputs."""
        return self.product(rows) @ rows.double().T

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

    matrix: Tensor = field(repr=False)

    @property
    def width(self) -> int:
        return self.matrix.shape[0]

    def trace_there(self) -> Tensor:
        return self.matrix.diagonal().double().sum() + self.remainder * self.width

    def _moved(self, device: torch.device) -> DenseCovariance:
        return replace(self, matrix=moved(self.matrix, device))

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}

    def dense(self) -> Tensor:
        matrix = self.matrix.double().clone()
        matrix.diagonal().add_(self.remainder)
        return matrix

    def product(self, rows: Tensor) -> Tensor:
        return rows.double() @ self.matrix.to(rows.device).double() + self.remainder * rows.double()

    def check(self) -> None:
        if self.matrix.dim() != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise InvalidCovarianceError(f"it has shape {tuple(self.matrix.shape)}, not (in, in)")
        if not torch.isfinite(self.matrix).all():
            raise InvalidCovarianceError("it holds NaN or Inf")
        _check_remainder(self.remainder)
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
    """A covariance of bounded rank plus a remainder: `C = Sᵀ S + ρ I`.

    The `factor` holds `S / scale`, shape `(k, in)`, in any floating dtype (`in_half_precision`), or is int8 and has
    `scales` (`in_eight_bits`).
    """

    factor: Tensor = field(repr=False)
    scale: float = 1.0  # a power of two that brings the factor into the range of float16
    scales: Scales | None = None  # what rows and columns of an int8 factor are multiplied by
    is_orthogonal: bool = False  # whether rows are known to be orthogonal and to fall in norm: eigen-directions of `C`

    is_factored = True

    @property
    def width(self) -> int:
        return self.factor.shape[1]

    @property
    def rank(self) -> int:
        return self.factor.shape[0]

    def trace_there(self) -> Tensor:
        squared = self.scale * self.scale  # infinite where `scale**2` is an OverflowError
        return self._stored().square().sum(dtype=torch.float64) * squared + self.remainder * self.width

    def _moved(self, device: torch.device) -> LowRankCovariance:
        scales = self.scales and Scales(*(moved(scale, device) for scale in self.scales))
        return replace(self, factor=moved(self.factor, device), scales=scales)

    def tensors(self) -> dict[str, Tensor]:
        if self.scales is None:
            return {"factor": self.factor}
        return {"factor": self.factor, "row_scales": self.scales.rows, "column_exponents": self.scales.columns}

    def numbers(self) -> dict[str, float]:
        return {"remainder": self.remainder, "scale": self.scale}

    def factor_rows(self, device: torch.device | str | None = None) -> Tensor:
        return self._stored(torch.float64, device) * self.scale

    def put_rows(self, out: Tensor) -> float:
        out.copy_(self.on(out.device).factor if self.scales is None else self._stored(torch.float64, out.device))
        return self.scale

    def add_to(self, total: Tensor, weight: float) -> None:
        add_lower_gram(total, weight**0.5 * self.factor_rows(total.device).T)
        total.diagonal().add_(weight * self.remainder)

    def _stored(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """`S / scale` exactly as it is stored; in float64 if it is stored so and else in float32, or in `dtype`."""
        exact = dtype or (torch.float64 if self.factor.dtype == torch.float64 else torch.float32)
        there = self if device is None else self.on(torch.device(device))
        return there.factor.to(exact) if there.scales is None else from_eight_bits(there.factor, there.scales, exact)

    def in_half_precision(self) -> LowRankCovariance:
        """The same with a factor in float16, scaled to the upper end of its range; doing it again changes nothing.

        Entries keep 11 bits, over 30 powers of two below the largest one. The trace is rounded with them: what a
        large input channel loses is nothing that the remainder could make up for, which all channels have.
        """
        rows = self.factor_rows()
        largest = rows.abs().max().item() if rows.numel() else 0.0
        if largest == 0.0 or not math.isfinite(largest):
            return replace(self, factor=self.factor.half(), scales=None, is_orthogonal=False)
        # The largest entry as float16 will round it, so that rounding up to the next power of two counts already.
        mantissa, exponent = math.frexp(largest)
        exponent += int(torch.tensor(mantissa, dtype=torch.float64).half().item() == 1.0)
        scale = 2.0 ** (exponent - 15)
        return replace(self, factor=(rows / scale).half(), scale=scale, scales=None, is_orthogonal=False)

    def in_eight_bits(self) -> LowRankCovariance:
        """The same with a factor in int8, with scales for its rows and columns."""
        numbers, scales = to_eight_bits(self.factor_rows())
        return replace(self, factor=numbers, scale=1.0, scales=scales, is_orthogonal=False)

    def dense(self) -> Tensor:
        factor = self.factor_rows()
        matrix = factor.T @ factor
        matrix.diagonal().add_(self.remainder)
        return matrix

    def product(self, rows: Tensor) -> Tensor:
        factor = self.factor_rows(rows.device)
        return (rows.double() @ factor.T) @ factor + self.remainder * rows.double()

    def moment(self, rows: Tensor) -> Tensor:
        exact = rows.double()
        seen = exact @ self.factor_rows(rows.device).T
        return torch.addmm(seen @ seen.T, exact, exact.T, alpha=self.remainder)

    def check(self) -> None:
        if self.factor.dim() != 2:
            raise InvalidCovarianceError(f"its factor has shape {tuple(self.factor.shape)}, not (k, in)")
        if (self.factor.dtype == torch.int8) != (self.scales is not None):
            raise InvalidCovarianceError(f"its factor has dtype {self.factor.dtype}; int8, and no other, has scales")
        if self.scales is not None and [scale.numel() for scale in self.scales] != list(self.factor.shape):
            raise InvalidCovarianceError("its scales are not one for each row and column of its factor")
        if not 0 < self.scale < math.inf:
            raise InvalidCovarianceError(f"its scale is {self.scale}, not a power of two")
        _check_remainder(self.remainder)
        if not math.isfinite(self.trace):
            raise InvalidCovarianceError("it holds NaN or Inf")


def _check_remainder(remainder: float) -> None:
    if not math.isfinite(remainder) or remainder < 0:
        raise InvalidCovarianceError(f"its remainder is {remainder}; a mean of squares is finite and not negative")


def know_traces(covariances: Sequence[Covariance]) -> None:
    """Ask for the traces of several covariances on one device at once; each keeps its own."""
    unknown = [covariance for covariance in covariances if "trace" not in vars(covariance)]
    for covariance, (trace,) in zip(unknown, numbers_of([covariance.trace_there() for covariance in unknown])):
        vars(covariance)["trace"] = trace  # where `cached_property` looks


def add_lower_gram(matrix: Tensor, rows: Tensor) -> None:
    """Add `rows · rowsᵀ` to the lower triangle of `matrix`, which is all that a Cholesky factorisation reads."""
    if len(rows) <= _BLOCK or not has_caches(rows.device):
        matrix.addmm_(rows, rows.T)
        return
    half = len(rows) // 2
    add_lower_gram(matrix[:half, :half], rows[:half])
    add_lower_gram(matrix[half:, half:], rows[half:])
    matrix[half:, :half].addmm_(rows[half:], rows[:half].T)
