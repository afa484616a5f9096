"""LPM, low-rank parameter merging: the least-squares merge of LoRA deltas in the metric of their layer's inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .covariance import Covariance, DenseCovariance, LowRankCovariance


class SingularMergeError(ValueError):
    """`R = Σ w_t C_t` has no inverse: some input direction was never seen and there is no ridge."""


@dataclass(frozen=True)
class LowRankDelta:
    """A weight change `ΔW = B A` with the LoRA scaling folded into `A`.

    Args:
        A (`torch.Tensor`): Shape `(r, in)`.
        B (`torch.Tensor`): Shape `(out, r)`.
    """

    A: Tensor
    B: Tensor

    def dense(self) -> Tensor:
        """`ΔW` as one float64 matrix of shape `(out, in)`."""
        return self.B.double() @ self.A.double()


@dataclass(frozen=True)
class _Task:
    covariance: Covariance
    weight: float
    deltas: Mapping[str, LowRankDelta]


class LeastSquaresMerge:
    """Merges the task deltas of layers that share one input.

        minimise over ΔW   Σ_t w_t ‖(ΔW − ΔW_t) C_t^½‖²_F,   C_t ← C_t + λ · mean(diag C_t) · I
        solution           ΔW* = [B_1 … B_T] · A*,  A* = [w_1 A_1 C_1; …; w_T A_T C_T] R⁻¹,  R = Σ_t w_t C_t

    Adding tasks one at a time and solving after each is the recursion of recursive least squares in information form:
    every step gives the optimum over the tasks so far, and the order does not matter. All products and solves are
    float64; the merged `A*` is returned in float32, and the `B_t` are stacked as they came.

    A layer that a task did not train counts as a delta of zero there: leave it out of `deltas`.

    Args:
        ridge (`float`, defaults to `1e-4`):
            `λ`. It pulls unseen directions to the tasks' mean delta.
    """

    def __init__(self, ridge: float = 1e-4) -> None:
        if not 0 <= ridge < math.inf:
            raise ValueError(f"`ridge` must be finite and not negative, but it is {ridge}.")
        self.ridge = ridge
        self._tasks: list[_Task] = []

    def add(self, covariance: Covariance, deltas: Mapping[str, LowRankDelta], weight: float = 1.0) -> None:
        """Add one task.

        Args:
            covariance ([`Covariance`]): `C_t` of the shared input, width `in`, without the ridge.
            deltas (`Mapping[str, LowRankDelta]`): The task's delta for each layer that it trained, by layer name.
            weight (`float`): `w_t ≥ 0`.

        Raises:
            ValueError: A width does not match, or the weight is negative.
        """
        if not 0 <= weight < math.inf:
            raise ValueError(f"a task's weight must be finite and not negative, but it is {weight}.")
        if self._tasks and self._tasks[0].covariance.width != covariance.width:
            raise ValueError(
                f"the covariance has width {covariance.width}, the one before {self._tasks[0].covariance.width}."
            )
        for name, delta in deltas.items():
            if delta.A.shape[1] != covariance.width:
                raise ValueError(f"'{name}' has input width {delta.A.shape[1]}, its covariance {covariance.width}.")
        self._tasks.append(_Task(covariance.with_ridge(self.ridge), weight, dict(deltas)))

    def solve(self) -> dict[str, LowRankDelta]:
        """The merged delta of every layer, `A*` in float32 of shape `(Σ r_t, in)`, blocks in the order of adding.

        Raises:
            SingularMergeError: A direction has no energy in any task and there is no ridge.
        """
        tasks = self._tasks
        blocks = [(name, t, delta) for t, task in enumerate(tasks) for name, delta in task.deltas.items()]
        if all(task.weight == 0 for task in tasks):  # nobody has a say here
            rows = [torch.zeros_like(delta.A) for _, _, delta in blocks]
        else:
            if all(task.weight * task.covariance.trace == 0 for task in tasks):
                # Nobody saw a token here: every direction is an unseen one, and these get the mean delta.
                tasks = [_Task(_identity_like(task.covariance), task.weight, task.deltas) for task in tasks]
            rows = _weighted_rows(tasks, [(t, delta.A) for _, t, delta in blocks])
        merged: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        for (name, _, delta), block in zip(blocks, rows):
            A_blocks, B_blocks = merged.setdefault(name, ([], []))
            A_blocks.append(block.float())
            B_blocks.append(delta.B)
        return {name: LowRankDelta(A=torch.cat(A), B=torch.cat(B, dim=1)) for name, (A, B) in merged.items()}


def _identity_like(covariance: Covariance) -> Covariance:
    return LowRankCovariance(remainder=1.0, tokens=0, factor=torch.zeros(0, covariance.width))


def _weighted_rows(tasks: Sequence[_Task], blocks: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """`w_t A C_t R⁻¹` for each `(t, A)` of `blocks`, float64, by the cheaper of two exact forms."""
    parts = [task.covariance for task in tasks]
    rank = sum(part.factor.shape[0] for part in parts if isinstance(part, LowRankCovariance))
    if any(isinstance(part, DenseCovariance) for part in parts) or rank >= parts[0].width:
        return _rows_by_cholesky(tasks, blocks)
    return _rows_in_span(tasks, blocks)


def _rows_by_cholesky(tasks: Sequence[_Task], blocks: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """Factor `R` (in × in) once and solve for every row."""
    width = tasks[0].covariance.width
    scatter = torch.zeros(width, width, dtype=torch.float64)
    moments: dict[int, Tensor] = {}
    for t, task in enumerate(tasks):
        weighted = task.covariance.dense().mul_(task.weight)
        scatter += weighted
        moments |= {i: A.double() @ weighted for i, (of, A) in enumerate(blocks) if of == t}
    stacked = torch.cat([moments[i] for i in range(len(blocks))])
    solved = torch.cholesky_solve(stacked.T, _cholesky(scatter)).T
    return list(solved.split([A.shape[0] for _, A in blocks]))


def _rows_in_span(tasks: Sequence[_Task], blocks: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """Work in the span of the stacked factors `Z` (K × in, K < in), never in `in × in`.

    `R = Zᵀ Z + ρ I`, where `Z` stacks `F_t = √w_t S_t`. With `N = (ρ I + Z Zᵀ)⁻¹` the push-through identity
    `Z R⁻¹ = N Z` keeps a small `ρ` out of the denominators:

        w A C_t R⁻¹ = A F_tᵀ N_t Z + (w ρ_t / ρ) (A − A Zᵀ N Z),   N_t: the rows of N that belong to F_t
    """
    factors, sizes = [], []
    for task in tasks:
        assert isinstance(task.covariance, LowRankCovariance)
        factors.append(task.weight**0.5 * task.covariance.factor.double())
        sizes.append(task.covariance.factor.shape[0])
    stacked = torch.cat(factors)
    remainder = sum(task.weight * task.covariance.remainder for task in tasks)
    if remainder <= 0:
        raise SingularMergeError("the tasks' inputs leave directions unseen; merge with `ridge` above 0")
    kernel = stacked @ stacked.T
    kernel.diagonal().add_(remainder)
    root = _cholesky(kernel)
    starts = [sum(sizes[:t]) for t in range(len(sizes))]

    coefficients = []  # of the rows of Z, and of A itself
    for t, A in blocks:
        rows, own = A.double(), slice(starts[t], starts[t] + sizes[t])
        share = tasks[t].weight * tasks[t].covariance.remainder / remainder
        in_span = -share * (rows @ stacked.T)
        in_span[:, own] += rows @ factors[t].T
        coefficients.append((in_span, share * rows))
    spanned = torch.cholesky_solve(torch.cat([in_span for in_span, _ in coefficients]).T, root).T @ stacked
    parts = spanned.split([A.shape[0] for _, A in blocks])
    return [part + own for part, (_, own) in zip(parts, coefficients)]


def _cholesky(matrix: Tensor) -> Tensor:
    root, info = torch.linalg.cholesky_ex(matrix)
    if info.item() != 0:
        raise SingularMergeError("the tasks' inputs leave directions unseen; merge with a larger `ridge`")
    return root
