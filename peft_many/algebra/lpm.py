"""LPM, low-rank parameter merging: the least-squares merge of LoRA deltas in the metric of their layer's inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .covariance import Covariance, LowRankCovariance
from .reduction import compress, of_full_rank, orthonormal, rounding_loss
from .scatter import SingularMergeError, inverse_scatter_product

__all__ = ["LeastSquaresMerge", "LowRankDelta", "SingularMergeError"]

# Share of a merged delta that may get lost when its factors are rounded; above, another factorisation is stored.
LARGEST_ROUNDING_LOSS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class LowRankDelta:
    """A weight change `ΔW = B A` with the LoRA scaling folded into `A`."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)

    def dense(self) -> Tensor:
        """`ΔW` as one float64 matrix of shape `(out, in)`."""
        return self.B.double() @ self.A.double()


@dataclass(frozen=True)
class MergedDelta(LowRankDelta):
    """A merged delta.

    It is `stacked` if `B` is the tasks' `[B_1 … B_T]` side by side to the bit, blocks in the order of adding.
    Otherwise it is rounded, or its columns are orthonormal and belong to no task.
    """

    stacked: bool = True
    task_A: Tensor | None = None  # the tasks' own [A_1; …; A_T], (Σ r_t, in), where the blocks were asked for


@dataclass(frozen=True)
class _Task:
    covariance: Covariance
    weight: float
    deltas: Mapping[str, LowRankDelta]


@dataclass(frozen=True)
class _Block:
    """A task's share in a layer: `w_t`, `C_t`, its delta, and the rows `w_t A_t C_t R⁻¹` of `A*` that come of it."""

    weight: float
    covariance: Covariance
    delta: LowRankDelta
    rows: Tensor


class LeastSquaresMerge:
    """Merges the task deltas of layers that share one input.

        minimise over ΔW   Σ_t w_t ‖(ΔW − ΔW_t) C_t^½‖²_F,   C_t ← C_t + λ · mean(diag C_t) · I
        solution           ΔW* = [B_1 … B_T] · A*,  A* = [w_1 A_1 C_1; …; w_T A_T C_T] R⁻¹,  R = Σ_t w_t C_t

    The ridge `λ` pulls unseen directions to the tasks' mean delta. Adding tasks one at a time and solving after each
    is the recursion of recursive least squares in information form: every step gives the optimum over the tasks so
    far, and the order does not matter. All products and solves are float64, whatever dtype deltas and covariances are
    stored in, on a device that must know it; only what comes back is rounded.

    A layer that a task did not train counts as a delta of zero there: leave it out of `deltas`.
    """

    def __init__(self, ridge: float = 1e-4, device: torch.device | str = "cpu") -> None:
        if not 0 <= ridge < math.inf:
            raise ValueError(f"`ridge` must be finite and not negative, but it is {ridge}.")
        self.ridge = ridge
        self.device = torch.device(device)
        self._tasks: list[_Task] = []

    def add(self, covariance: Covariance, deltas: Mapping[str, LowRankDelta], weight: float = 1.0) -> None:
        """Add one task: `C_t` of the shared input, without the ridge, its `ΔW_t` by the layer's name, and `w_t ≥ 0`.

        A width that does not match is a `ValueError`, as is a negative weight.
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

    def solve(
        self, rank: int | None = None, dtype: torch.dtype = torch.float32, keep_blocks: bool = False
    ) -> dict[str, MergedDelta]:
        """The merged delta of every layer, `A` of shape `(Σ r_t, in)` and `B` of `(out, Σ r_t)`, or of lower rank.

        They are float32, float16 or bfloat16. With a `rank`, the best delta of that rank under the same objective is
        `U Uᵀ ΔW*` with the `rank` leading left singular vectors `U` of `ΔW* R^½` (reduced-rank regression): it gives
        up what the tasks' inputs excite least, where plain SVD gives up the smallest weights. Where a task's delta has
        the layer's full rank, the merged one has that too and no more, unless `keep_blocks`.

        `keep_blocks`, without `rank`, gives back `task_A` too, and keeps `[B_1 … B_T]` also where the blocks are large
        and cancel: what then gets lost in rounding is small beside the tasks' deltas, if not beside the merged one.

        Raises `SingularMergeError` if a direction has no energy in any task and there is no ridge, and `OverflowError`
        if a merged delta is beyond the range of float16.
        """
        layers = self._solved().items()
        return {name: self._merged_layer(name, blocks, rank, dtype, keep_blocks) for name, blocks in layers}

    def _parts(self) -> list[tuple[float, Covariance]]:
        """The `(w_t, C_t)` of `R`."""
        if any(task.weight * task.covariance.trace > 0 for task in self._tasks):
            return [(task.weight, task.covariance) for task in self._tasks]
        # Nobody saw a token here: every direction is an unseen one, and these get the mean delta.
        return [(task.weight, _identity(task.covariance.width)) for task in self._tasks]

    def _solved(self) -> dict[str, list[_Block]]:
        """By layer, the blocks of the tasks that trained it, in the order of adding."""
        parts = self._parts()
        own = [(name, t, delta) for t, task in enumerate(self._tasks) for name, delta in task.deltas.items()]
        if all(weight == 0 for weight, _ in parts):  # then no task counts
            rows = [torch.zeros_like(delta.A, dtype=torch.float64, device=self.device) for _, _, delta in own]
        else:
            rows = inverse_scatter_product(parts, [(t, delta.A) for _, t, delta in own], self.device)
        layers: dict[str, list[_Block]] = {}
        for (name, t, delta), solved in zip(own, rows):
            layers.setdefault(name, []).append(_Block(*parts[t], delta, solved))
        return layers

    def _merged_layer(
        self, name: str, blocks: Sequence[_Block], rank: int | None, dtype: torch.dtype, keep_blocks: bool
    ) -> MergedDelta:
        """The blocks of one layer in the factorisation that keeps them best, or cut to the rank."""
        B = torch.cat([block.delta.B.to(self.device) for block in blocks], dim=1)
        A = torch.cat([block.rows for block in blocks])
        own_A = [block.delta.A.to(self.device) for block in blocks]
        is_full = not keep_blocks and has_full_rank([len(rows) for rows in own_A], (len(B), A.shape[1]))
        if rank is not None and rank < (min(len(B), *A.shape) if is_full else len(A)):
            moments = [block.weight * block.covariance.product(rows) for block, rows in zip(blocks, own_A)]
            return rounded_delta(name, *compress(A, B, torch.cat(moments), rank), dtype, stacked=False)
        if keep_blocks:
            return rounded_delta(name, A, B, dtype, stacked=True, task_A=torch.cat(own_A))
        if is_full:
            return rounded_delta(name, *of_full_rank(B.double() @ A), dtype, stacked=False)
        if rounding_loss(A, B, dtype) > LARGEST_ROUNDING_LOSS[dtype]:  # the blocks are large and cancel
            return rounded_delta(name, *orthonormal(A, B), dtype, stacked=False)
        return rounded_delta(name, A, B, dtype, stacked=True)


def rounded_delta(
    name: str, A: Tensor, B: Tensor, dtype: torch.dtype, stacked: bool, task_A: Tensor | None = None
) -> MergedDelta:
    """A layer's merged delta as it is stored, on the CPU; `stacked` is kept only if `B` is not rounded by it.

    An entry beyond the range of the dtype is an `OverflowError`.
    """
    exact = torch.equal(B.to(dtype).to(B.dtype), B)
    own = None if task_A is None else task_A.to(dtype).cpu()
    rounded = MergedDelta(A=A.to(dtype).cpu(), B=B.to(dtype).cpu(), stacked=stacked and exact, task_A=own)
    if not all(part is None or part.isfinite().all() for part in (rounded.A, rounded.B, own)):
        raise OverflowError(
            f"the merged '{name}' has entries beyond the range of {dtype}; bfloat16 has that of float32"
        )
    return rounded


def has_full_rank(ranks: Sequence[int], shape: tuple[int, int]) -> bool:
    """Whether one of several deltas has the full rank of its layer, of shape `(out, in)`: blocks save nothing then."""
    return len(ranks) > 1 and max(ranks) >= min(shape)


def _identity(width: int) -> Covariance:
    return LowRankCovariance(remainder=1.0, factor=torch.zeros(0, width, dtype=torch.float32))
