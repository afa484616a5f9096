"""Running sums of a layer's inputs: whole, or a streaming sketch in bounded memory whatever the layer's width."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .covariance import DenseCovariance, LowRankCovariance
from .precision import float32_products, without_autocast
from .spectrum import Spectrum, eigen_directions

# Features that are multiplied at a time: their copies in float32 then stay in the cache, which halves the cost.
_BLOCK = 2048


def running_covariance(
    width: int, size: int | None = None, device: torch.device | str = "cpu"
) -> CovarianceAccumulator | CovarianceSketch:
    """A sketch of `size` directions, or, of inputs that are no wider and with no `size`, the whole sum."""
    device = torch.device(device)
    if size is not None and size < width:
        return CovarianceSketch(width, size, device)
    return CovarianceAccumulator(width, "cpu" if device.type == "mps" else device)  # there is no float64 on "mps"


class CovarianceAccumulator:
    """Sums `x xᵀ` over batches and gives their mean.

    Products and sums are float64: float32 products leave noise of 1e-7 of the *largest* eigenvalue in directions that
    no token reached, far above a small ridge, and the merge divides by those directions.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add rows, shape `(tokens, in)`, any floating dtype; NaN or Inf is a `FloatingPointError`."""
        rows = inputs.detach().to(device=self.total.device, dtype=torch.float64)
        if not math.isfinite(rows.square().sum().item()):
            raise FloatingPointError("the inputs hold NaN or Inf")
        self.total.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]

    def result(self) -> DenseCovariance:
        """The mean of `x xᵀ` over all rows so far, on the CPU; zero if there were none."""
        # addmm is symmetric up to rounding; make it so to the bit, as it is stored and checked.
        mean = (self.total + self.total.T).div_(2 * max(self.tokens, 1))
        return DenseCovariance(remainder=0.0, matrix=mean.cpu())


class CovarianceSketch:
    """Sums up `C = E[x xᵀ]` along `size` directions, and its trace exactly; never holds an `in × in` matrix.

    A streaming Nyström sketch (Tropp, Yurtsever, Udell, Cevher 2017, arXiv 1706.05736): with a fixed test matrix `Ω`
    (in × size) and `Q = X Ω` only `Y = XᵀQ` and `QᵀQ` are summed up, and in the end `C ≈ Y (QᵀQ)⁻¹ Yᵀ`, which is `XᵀX`
    with the tokens projected on the span of `Q`'s columns. Unlike there, `Ω` is not random but comes from the first
    tokens, `Ω = orth(C₁ G)` with `G` Gaussian and `C₁` their second moment, which makes `Y` one step of a subspace
    iteration. The merged deltas are then within a sixth, often a few per cent, of the best approximation's of its
    rank, at two matrix products for each token; Frequent Directions and incremental SVD cost ten times as much
    (`benchmarks/sketches.py`).

    The first `2 · size` tokens are kept as they are: they take no more memory than the sums, and with no more tokens
    than these nothing is lost.

    Products are float32, whatever precision the user allows for matrix products. Of bfloat16 activations `Q` is
    bfloat16 as well, which halves the cost: as a projection's span, its rounding counts only squared, and the products
    of what has been rounded are exact but for float32 sums. Totals and the final decomposition are float64 (totals are
    float32 on devices without it). Of the directions that are followed, the last fifth or so is inaccurate.
    """

    def __init__(self, width: int, size: int, device: torch.device | str = "cpu") -> None:
        self.width, self.size, self.device = width, size, torch.device(device)
        self.tokens = 0
        self.energy = 0.0  # Σ ‖x‖², of which the mean is tr C
        self._first: list[Tensor] = []
        self._sums: _Sums | None = None  # once there are more tokens than are kept

    @without_autocast()
    def update(self, inputs: Tensor) -> None:
        """Add rows as in a [`CovarianceAccumulator`]; an entry beyond 1e18 is a `FloatingPointError` too."""
        rows = inputs.detach().to(self.device)
        energy = _energy(rows)
        if not math.isfinite(energy):
            raise FloatingPointError("the inputs hold NaN or Inf")
        self.energy += energy
        self.tokens += len(rows)
        if self._sums is None:
            self._first.append(rows.clone() if rows.data_ptr() == inputs.data_ptr() else rows)
            if self.tokens < 2 * self.size:
                return
            rows, self._first = torch.cat(self._first), []
            self._sums = _Sums(_orthonormal_test_matrix(rows.float(), self.size))
        self._sums.add(rows)

    def result(self) -> LowRankCovariance:
        """The mean of `x xᵀ` over all rows so far, on the CPU: up to `size` directions, and the rest of the trace."""
        return self.spectrum().keep(self.size)

    def spectrum(self) -> Spectrum:
        """Eigenvalues and eigen-directions of the mean of `x xᵀ`, on the CPU; at most `size` of them.

        Eigenvalues are never above the true ones by more than rounding, and the trace is exact.
        """
        if self._sums is None:
            none = torch.zeros(0, self.width, dtype=torch.float64)
            rows = torch.cat([none, *(rows.cpu().double() for rows in self._first)])
            factor = rows / max(self.tokens, 1) ** 0.5
            return eigen_directions(LowRankCovariance(remainder=0.0, factor=factor))
        test, moved, core = (part.cpu().double() for part in (self._sums.test, self._sums.moved, self._sums.core))
        moved, core, gram = moved / self.tokens, core / self.tokens, test.T @ test
        # Float32 rounding of the products may make the core negative in its smallest directions; the sketch of
        # `C + shift·I`, with the shift taken off again below, is definite.
        shift = torch.finfo(torch.float32).eps * moved.norm().item()
        root, info = torch.linalg.cholesky_ex(core + shift * gram)
        while info.item() != 0:
            shift *= 10
            root, info = torch.linalg.cholesky_ex(core + shift * gram)
        moved = moved + shift * test
        halves = torch.linalg.solve_triangular(root, moved.T, upper=False)  # Eᵀ with C ≈ E Eᵀ
        values, mixing = torch.linalg.eigh(halves @ halves.T)
        values, mixing = values.flip(0).clamp(min=torch.finfo(torch.float64).tiny), mixing.flip(1)
        directions = mixing.T @ halves / values[:, None].sqrt()
        values = (values - shift).clamp(min=0.0)
        rest = max(0.0, self.energy / self.tokens - values.sum().item())
        return Spectrum(values, directions, rest)


class _Sums:
    """`Ω`, `Y` and `QᵀQ`, these two not yet divided by the tokens."""

    def __init__(self, test: Tensor) -> None:
        dtype = torch.float32 if test.device.type == "mps" else torch.float64  # Apple's GPUs know no float64
        self.test = test
        self.moved = torch.zeros_like(test, dtype=dtype)
        self.core = torch.zeros(test.shape[1], test.shape[1], dtype=dtype, device=test.device)

    def add(self, rows: Tensor) -> None:
        half = rows.dtype == torch.bfloat16
        with float32_products(full=not half):  # the factors are bfloat16 already
            projected = (rows @ self.test.bfloat16()).float() if half else rows.float() @ self.test
            self.core += projected.T @ projected
            for block, summed in zip(rows.split(_BLOCK, dim=1), self.moved.split(_BLOCK)):
                summed += block.float().T @ projected


def _energy(rows: Tensor) -> float:
    """`Σ ‖x‖²`, each norm in float32 and their sum in float64."""
    norms = [torch.linalg.vector_norm(block.float(), dim=1) for block in rows.split(64)]
    return torch.cat(norms).double().square().sum().item() if norms else 0.0


def _orthonormal_test_matrix(rows: Tensor, size: int) -> Tensor:
    """`Ω = orth(C₁ G)` for the second moment `C₁` of `rows`, shape `(in, size)`, float32."""
    width = rows.shape[1]
    generator = torch.Generator().manual_seed(width)
    gaussian = torch.randn(width, size, generator=generator, dtype=torch.float32).to(rows.device)
    with float32_products(full=True):
        moved = rows.T @ (rows @ gaussian) / len(rows)
    # Where the first tokens span fewer than `size` directions, Gaussian ones take the free places.
    moved += 1e-3 * rows.square().mean() * gaussian
    return torch.linalg.qr(moved).Q.contiguous()
