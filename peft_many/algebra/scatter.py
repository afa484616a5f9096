"""Products with the inverse of `R = Σ_t w_t C_t`, by the cheaper of two exact forms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .covariance import Covariance, add_lower_gram


class SingularMergeError(ValueError):
    """`R = Σ w_t C_t` has no inverse: some input direction was never seen and there is no ridge."""


def inverse_scatter_product(
    parts: Sequence[tuple[float, Covariance]],
    blocks: Sequence[tuple[int, Tensor]],
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """`w_t A C_t R⁻¹`, shape `(r, in)`, float64, for each block `(t, A)`; the parts of `R` are `(w_t, C_t)`."""
    width = parts[0][1].width
    rank, rows = sum(part.rank for _, part in parts), sum(A.shape[0] for _, A in blocks)
    if span_is_cheaper(width, rank, rows):  # never with a part that is held whole, whose rank is the width
        return _in_span(parts, blocks, device)
    return _by_cholesky(parts, blocks, device)


def span_is_cheaper(width: int, rank: int, rows: int) -> bool:
    """Whether working in the span of the stacked factors is cheaper than in `in × in`, as [`cost`] counts."""
    return _cost_in_span(width, rank, rows) < _cost_by_cholesky(width, rank, rows)


def cost(width: int, rank: int, rows: int) -> float:
    """Multiplications that [`inverse_scatter_product`] takes of `rank` rows in all factors and `rows` in all `A`."""
    return min(_cost_in_span(width, rank, rows), _cost_by_cholesky(width, rank, rows))


def _cost_in_span(width: int, rank: int, rows: int) -> float:
    # Half of the symmetric Z Zᵀ, its Cholesky factor, A Zᵀ, two triangular solves, and the way back through Z.
    return rank**2 * width / 2 + rank**3 / 6 + rows * (2 * rank * width + rank**2)


def _cost_by_cholesky(width: int, rank: int, rows: int) -> float:
    # Half of the symmetric Zᵀ Z, its Cholesky factor, and two triangular solves.
    return width**2 * rank / 2 + width**3 / 6 + rows * width**2


def _by_cholesky(
    parts: Sequence[tuple[float, Covariance]], blocks: Sequence[tuple[int, Tensor]], device: torch.device | str
) -> list[Tensor]:
    """Factor `R` (in × in) once and solve for every row."""
    width = parts[0][1].width
    scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
    for weight, part in parts:
        part.add_to(scatter, weight)
    moments = torch.cat([parts[t][0] * parts[t][1].product(A.to(device)) for t, A in blocks])
    solved = torch.cholesky_solve(moments.T, _cholesky(scatter)).T
    return list(solved.split([A.shape[0] for _, A in blocks]))


def _in_span(
    parts: Sequence[tuple[float, Covariance]], blocks: Sequence[tuple[int, Tensor]], device: torch.device | str
) -> list[Tensor]:
    """Work in the span of the stacked factors `Z` (K × in), never in `in × in`.

    `R = Zᵀ Z + ρ I`, where `Z` stacks `F_t = √w_t S_t`. With `N = (ρ I + Z Zᵀ)⁻¹` the push-through identity
    `Z R⁻¹ = N Z` keeps a small `ρ` out of the denominators:

        w A C_t R⁻¹ = A F_tᵀ N_t Z + (w ρ_t / ρ) (A − A Zᵀ N Z),   N_t: the rows of N that belong to F_t
    """
    weights, covariances = [weight for weight, _ in parts], [part for _, part in parts]
    ends = list(itertools.accumulate(part.rank for part in covariances))
    stacked = torch.empty(ends[-1], covariances[0].width, dtype=torch.float64, device=device)
    for end, weight, part in zip(ends, weights, covariances):
        torch.mul(part.factor_rows(device), weight**0.5, out=stacked[end - part.rank : end])
    remainder = sum(weight * part.remainder for weight, part in zip(weights, covariances))
    if remainder <= 0:
        raise SingularMergeError("the tasks' inputs leave directions unseen; merge with `ridge` above 0")
    kernel = torch.zeros(len(stacked), len(stacked), dtype=torch.float64, device=device)
    add_lower_gram(kernel, stacked)
    kernel.diagonal().add_(remainder)
    root = _cholesky(kernel)

    coefficients = []  # of the rows of Z, and of A itself
    for t, A in blocks:
        share = weights[t] * covariances[t].remainder / remainder
        products = A.to(device).double() @ stacked.T
        own = slice(ends[t] - covariances[t].rank, ends[t])
        in_span = -share * products
        in_span[:, own] += products[:, own]
        coefficients.append((in_span, share))
    spanned = torch.cholesky_solve(torch.cat([in_span for in_span, _ in coefficients]).T, root).T @ stacked
    parts_of = spanned.split([A.shape[0] for _, A in blocks])
    return [part + share * A.to(device).double() for part, (_, share), (_, A) in zip(parts_of, coefficients, blocks)]


def _cholesky(matrix: Tensor) -> Tensor:
    root, info = torch.linalg.cholesky_ex(matrix)
    if info.item() != 0:
        raise SingularMergeError("the tasks' inputs leave directions unseen; merge with a larger `ridge`")
    return root
