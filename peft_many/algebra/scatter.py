"""Products with the inverse of `R = Σ_t w_t C_t`, by the cheaper of two exact forms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .covariance import Covariance, add_lower_gram
from .devices import moved, numbers_of

_NEARLY_SINGULAR = "the sum of the tasks' covariances is nearly singular; pass a larger `ridge`"


class SingularMergeError(ValueError):
    """`R = Σ w_t C_t` has no inverse: some input direction was never seen and there is no ridge."""


@dataclass(frozen=True)
class Seen:
    """What tasks' inputs make of rows, in the span of the stacked factors: small matrices that solving makes anyway.

    With `Z` the stacked `√w_t S_t`, `A` all rows that were solved for and `A*` the solutions.
    """

    rows: Tensor  # A
    own: Tensor  # A Zᵀ, but zero outside the columns of each row's own task
    solved: Tensor  # A* Zᵀ
    columns: Sequence[slice]  # of each part
    weights: Sequence[float]

    def factor(self, merged: slice, own: slice, t: int) -> Tensor:
        """`[A*; A_t] S_tᵀ` of these rows, shape `(n, k_t)`, of a part that has weight."""
        columns = self.columns[t]
        return torch.cat([self.solved[merged, columns], self.own[own, columns]]) / self.weights[t] ** 0.5


def inverse_scatter_product(
    parts: Sequence[tuple[float, Covariance]],
    blocks: Sequence[tuple[int, Tensor]],
    device: torch.device,
) -> tuple[Tensor, Seen | None]:
    """`w_t A C_t R⁻¹` of every block `(t, A)`, one below the other, float64; the parts of `R` are `(w_t, C_t)`.

    Zero if no part has weight. Beside it what the tasks' inputs make of the rows, where that is known. On a GPU only
    the Cholesky factorisation is waited for, as it may fail.
    """
    if all(weight == 0 for weight, _ in parts):
        return torch.zeros_like(torch.cat([A for _, A in blocks]), dtype=torch.float64), None
    width = parts[0][1].width
    rank, rows = sum(part.rank for _, part in parts), sum(A.shape[0] for _, A in blocks)
    if span_is_cheaper(width, rank, rows):  # never with a part that is held whole, whose rank is the width
        return _in_span(parts, blocks, device)
    return _by_cholesky(parts, blocks, device), None


def span_is_cheaper(width: int, rank: int, rows: int) -> bool:
    """Whether working in the span of the stacked factors is cheaper than in `in × in`, by [`multiplications`]."""
    return _multiplications_in_span(width, rank, rows) < _multiplications_by_cholesky(width, rank, rows)


def multiplications(width: int, rank: int, rows: int) -> float:
    """How many [`inverse_scatter_product`] takes of `rank` rows in all factors and `rows` in all `A`."""
    return min(_multiplications_in_span(width, rank, rows), _multiplications_by_cholesky(width, rank, rows))


def _multiplications_in_span(width: int, rank: int, rows: int) -> float:
    # Half of the symmetric Z Zᵀ, its Cholesky factor, A Zᵀ, two triangular solves, and the way back through Z.
    return rank**2 * width / 2 + rank**3 / 6 + rows * (2 * rank * width + rank**2)


def _multiplications_by_cholesky(width: int, rank: int, rows: int) -> float:
    # Half of the symmetric Zᵀ Z, its Cholesky factor, and two triangular solves.
    return width**2 * rank / 2 + width**3 / 6 + rows * width**2


def _by_cholesky(
    parts: Sequence[tuple[float, Covariance]], blocks: Sequence[tuple[int, Tensor]], device: torch.device
) -> Tensor:
    """Factor `R` (in × in) once and solve for every row."""
    width = parts[0][1].width
    scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
    for weight, part in parts:
        part.add_to(scatter, weight)
    moments = torch.cat([parts[t][0] * parts[t][1].product(A.to(device)) for t, A in blocks])
    return torch.cholesky_solve(moments.T, cholesky(scatter, _NEARLY_SINGULAR)).T


def _in_span(
    parts: Sequence[tuple[float, Covariance]], blocks: Sequence[tuple[int, Tensor]], device: torch.device
) -> tuple[Tensor, Seen]:
    """Work in the span of the stacked factors `Z` (K × in), never in `in × in`.

    `R = Zᵀ Z + ρ I`, where `Z` stacks `F_t = √w_t S_t`. With `N = (ρ I + Z Zᵀ)⁻¹` the push-through identity
    `Z R⁻¹ = N Z` keeps a small `ρ` out of the denominators:

        A* = w A C_t R⁻¹ = X N Z + s A,   X = A F_tᵀ − s A Zᵀ,   s = w ρ_t / ρ   (A F_tᵀ in the columns of t)
        A* Zᵀ = A F_tᵀ − ρ X N

    The rows of `Z` are held as they are stored, `Z = D S`; the factors `D` go to the small matrices.
    """
    weights, covariances = [weight for weight, _ in parts], [part for _, part in parts]
    remainder = sum(weight * part.remainder for weight, part in zip(weights, covariances))
    if remainder <= 0:
        raise SingularMergeError("the sum of the tasks' covariances is singular; pass a `ridge` above 0")
    columns = slices(counts := [part.rank for part in covariances])
    S = torch.empty(sum(counts), covariances[0].width, dtype=torch.float64, device=device)
    scales = [part.put_rows(S[rows]) for part, rows in zip(covariances, columns)]
    D = _repeated([w**0.5 * scale for w, scale in zip(weights, scales)], counts, device)
    kernel = torch.zeros(len(S), len(S), dtype=torch.float64, device=device)
    add_lower_gram(kernel, S)
    kernel.mul_(D).mul_(D[:, None]).diagonal().add_(remainder)
    root = cholesky(kernel, _NEARLY_SINGULAR)

    ranks = [A.shape[0] for _, A in blocks]
    A = torch.cat([A.to(device) for _, A in blocks]).double()
    shares = _repeated([weights[t] * covariances[t].remainder / remainder for t, _ in blocks], ranks, device)[:, None]
    products = (A @ S.T).mul_(D)
    own = torch.zeros_like(products)
    for t, rows in zip([t for t, _ in blocks], slices(ranks)):
        own[rows, columns[t]] = products[rows, columns[t]]
    spanned = torch.cholesky_solve((own - shares * products).T, root).T
    solved = ((spanned * D) @ S).addcmul_(shares, A)
    return solved, Seen(A, own, own - remainder * spanned, columns, weights)


def slices(sizes: Sequence[int]) -> list[slice]:
    """The places of parts of these sizes, end to end."""
    ends = itertools.accumulate(sizes, initial=0)
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def symmetric(top: Tensor, side: Tensor, corner: Tensor) -> Tensor:
    """The symmetric matrix of these blocks, `side` above the diagonal."""
    return torch.cat([torch.cat([top, side], dim=1), torch.cat([side.T, corner], dim=1)])


def _repeated(values: Sequence[float], times: Sequence[int], device: torch.device) -> Tensor:
    """Each value as often as is said, float64."""
    whole = [value for value, count in zip(values, times) for _ in range(count)]
    return moved(torch.tensor(whole, dtype=torch.float64), device)


def cholesky(matrix: Tensor, otherwise: str) -> Tensor:
    """`L` with `L Lᵀ` the matrix, of which the lower triangle is read; if it is singular, an error that says this."""
    root, info = torch.linalg.cholesky_ex(matrix)
    if numbers_of([info]) != [[0.0]]:
        raise SingularMergeError(otherwise)
    return root
