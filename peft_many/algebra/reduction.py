"""Other factorisations of a merged delta: of lower rank, or with factors that float32 holds."""

from __future__ import annotations

import torch
from torch import Tensor


def compress(A: Tensor, B: Tensor, moments: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The delta of the given rank that is nearest to `B A` in the metric of `R`, that is on the tasks' inputs.

    `min ‖(W − B A) R^½‖` over `W` of that rank is `U Uᵀ B A`, with `U` the leading left singular vectors of
    `B A R^½` (reduced-rank regression; Izenman 1975). As the merge's objective is `‖(W − ΔW*) R^½‖²` and a constant,
    this is its optimum among the deltas of that rank. Only the Gram matrix `B (A R Aᵀ) Bᵀ` is needed, never `R^½`;
    `moments` is `A R`, float64 like `A`.

    Both factors come back in float64. The columns of `B` are orthonormal (beyond `out` zero), and the first `k` of
    them are the optimum of rank `k`.
    """
    Q, upper = torch.linalg.qr(B.double())
    gram = upper @ (A @ moments.T) @ upper.T
    _, directions = torch.linalg.eigh((gram + gram.T) / 2)
    leading = directions.flip(1)[:, :rank]
    return padded(leading.T @ upper @ A, Q @ leading, rank)


def nearest_of_rank(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The delta of the given rank that is nearest to a dense one in the Frobenius norm (Eckart and Young 1936).

    In float64. Of the SVD only the leading singular vectors of the shorter side are needed; they come from the
    eigenvectors of its Gram matrix, several times faster. That resolves singular values down to 1e-8 of the largest,
    so the result is within about 1e-8 of the nearest. The columns of `B`, or the rows of `A` if `in < out`, are
    orthonormal (beyond `min(out, in)` zero).
    """
    delta = delta.double()
    if delta.shape[1] < delta.shape[0]:
        A, B = nearest_of_rank(delta.T, rank)
        return B.T, A.T
    _, directions = torch.linalg.eigh(delta @ delta.T)
    leading = directions.flip(1)[:, :rank]
    return padded(leading.T @ delta, leading, rank)


def of_full_rank(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A dense delta with the identity for the smaller one of its factors `A` and `B`."""
    out, width = delta.shape
    if out < width:
        return delta, torch.eye(out, dtype=delta.dtype, device=delta.device)
    return torch.eye(width, dtype=delta.dtype, device=delta.device), delta


def orthonormal(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same delta and shapes with orthonormal columns in `B`, so that nothing cancels in the product; float64."""
    Q, upper = torch.linalg.qr(B.double())
    return padded(upper @ A, Q, B.shape[1])


def padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """With rows and columns of zero up to a rank that a layer of few outputs, say, cannot have."""
    missing = rank - A.shape[0]
    return torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))


def rounding_loss(A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """`‖B A − dtype(B) dtype(A)‖ / ‖B A‖` in the Frobenius norm: large where rows of `A` are large and cancel.

    A scalar where the factors are; infinite if these are beyond the range of the dtype.
    """
    exact, rounded = B.double(), A.to(dtype)
    lost_rows = A - rounded
    whole = _square_of_product(exact, A)
    if B.dtype != dtype:  # else nothing of it is lost
        lost_rows = torch.cat([lost_rows, rounded.double()])
        exact = torch.cat([exact, exact - B.to(dtype).double()], dim=1)
    lost = _square_of_product(exact, lost_rows)
    return torch.where(lost.isfinite(), torch.where(whole > 0, lost / whole, 0.0).sqrt(), torch.inf)


def _square_of_product(B: Tensor, A: Tensor) -> Tensor:
    # Rows of `A` that cancel do so in the product with `BᵀB`, and not only in the sum.
    return torch.dot((B.T @ B @ A).flatten(), A.flatten()).clamp(min=0.0)
