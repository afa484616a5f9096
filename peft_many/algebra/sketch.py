"""A streaming sketch of a covariance: bounded memory whatever the layer's width, matrix products only."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .covariance import LowRankCovariance, Spectrum, eigen_directions


class CovarianceSketch:
    """Sums up `C = E[x xᵀ]` along `size` directions, and its trace exactly; never holds an `in × in` matrix.

    A streaming Nyström sketch (Tropp, Yurtsever, Udell, Cevher 2017, arXiv 1706.05736): with a fixed test matrix `Ω`
    (in × size) only `Y = C Ω` is summed up, and in the end `C ≈ Y (Ωᵀ Y)⁻¹ Yᵀ`. Unlike there, `Ω` is not random but
    comes from the first tokens, `Ω = orth(C₁ G)` with `G` Gaussian and `C₁` their second moment, which makes `Y` one
    step of a subspace iteration. The merged deltas are then within a tenth, often a few per cent, of the best
    approximation's of its rank, at two matrix products for each token; Frequent Directions and incremental SVD cost
    ten times as much (`benchmarks/sketches.py`).

    The first `2 · size` tokens are kept as they are: they take no more memory than the sums, and with no more tokens
    than these nothing is lost.

    Products are float32 of the activations, whatever precision the user allows for matrix products; sums and the final
    decomposition are float64 (sums are float32 on devices without it).

    Args:
        width (`int`): The number of input features, `in`.
        size (`int`): How many directions are followed, `size < in`. The last fifth or so of them is inaccurate.
        device (`torch.device`): Where to sum up; that of the activations is the natural choice.
    """

    def __init__(self, width: int, size: int, device: torch.device | str = "cpu") -> None:
        self.width, self.size, self.device = width, size, torch.device(device)
        self.tokens = 0
        self.energy = 0.0  # Σ ‖x‖², of which the mean is tr C
        self._first: list[Tensor] = []
        self._test: Tensor | None = None  # Ω
        self._sum: Tensor | None = None  # Y, not yet divided by the tokens

    def update(self, inputs: Tensor) -> None:
        """Add the rows of `inputs`, shape `(tokens, in)`, any floating dtype.

        Raises:
            FloatingPointError: There is NaN or Inf among them, or an entry beyond 1e18.
        """
        rows = inputs.detach().to(device=self.device, dtype=torch.float32)
        energy = rows.square().sum().item()
        if not math.isfinite(energy):
            raise FloatingPointError("the inputs hold NaN or Inf")
        self.energy += energy
        self.tokens += len(rows)
        if self._test is None:
            self._first.append(rows.clone() if rows.data_ptr() == inputs.data_ptr() else rows)
            if self.tokens < 2 * self.size:
                return
            rows, self._first = torch.cat(self._first), []
            self._test = _orthonormal_test_matrix(rows, self.size)
            self._sum = torch.zeros(self.width, self.size, dtype=_sum_dtype(self.device), device=self.device)
        assert self._sum is not None
        with _full_precision():
            self._sum += rows.T @ (rows @ self._test)

    def result(self) -> LowRankCovariance:
        """The mean of `x xᵀ` over all rows so far, on the CPU: up to `size` directions, and the rest of the trace."""
        return self.spectrum().keep(self.size)

    def spectrum(self) -> Spectrum:
        """Eigenvalues and eigen-directions of the mean of `x xᵀ`, on the CPU; at most `size` of them.

        Eigenvalues are never above the true ones by more than rounding, and the trace is exact.
        """
        if self._test is None:
            rows = torch.cat([torch.zeros(0, self.width), *(rows.cpu() for rows in self._first)])
            factor = rows.double() / max(self.tokens, 1) ** 0.5
            return eigen_directions(LowRankCovariance(remainder=0.0, tokens=self.tokens, factor=factor))
        assert self._sum is not None
        test, moved = self._test.cpu().double(), self._sum.cpu().double() / self.tokens
        # Float32 rounding of the products may make ΩᵀY negative in its smallest directions; a shift of that size,
        # taken off again below, restores it.
        shift = torch.finfo(torch.float32).eps * moved.norm().item()
        moved = moved + shift * test
        core = test.T @ moved
        root, info = torch.linalg.cholesky_ex((core + core.T) / 2)
        while info.item() != 0:
            moved, shift = moved + 9 * shift * test, 10 * shift
            core = test.T @ moved
            root, info = torch.linalg.cholesky_ex((core + core.T) / 2)
        halves = torch.linalg.solve_triangular(root, moved.T, upper=False)  # Eᵀ with C ≈ E Eᵀ
        values, mixing = torch.linalg.eigh(halves @ halves.T)
        values, mixing = values.flip(0).clamp(min=torch.finfo(torch.float64).tiny), mixing.flip(1)
        directions = mixing.T @ halves / values[:, None].sqrt()
        values = (values - shift).clamp(min=0.0)
        rest = max(0.0, self.energy / self.tokens - values.sum().item())
        return Spectrum(values, directions, rest, self.tokens)


def _orthonormal_test_matrix(rows: Tensor, size: int) -> Tensor:
    """`Ω = orth(C₁ G)` for the second moment `C₁` of `rows`, shape `(in, size)`, float32."""
    width = rows.shape[1]
    generator = torch.Generator().manual_seed(width)
    gaussian = torch.randn(width, size, generator=generator).to(rows.device)
    with _full_precision():
        moved = rows.T @ (rows @ gaussian) / len(rows)
    # Where the first tokens span fewer than `size` directions, Gaussian ones take the free places.
    moved += 1e-3 * rows.square().mean() * gaussian
    return torch.linalg.qr(moved).Q.contiguous()


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs know no float64


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products as such: the rounding of TF32 and bfloat16, which users allow, would drown small directions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
