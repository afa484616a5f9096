"""LPM, low-rank parameter merging: the least-squares merge of LoRA deltas in the metric of their layer's inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .covariance import Covariance, LowRankCovariance, know_traces
from .devices import float64_device, moved, numbers_of
from .reduction import compress, of_full_rank, orthonormal, rounding_loss
from .scatter import Seen, SingularMergeError, inverse_scatter_product, slices, symmetric

__all__ = ["LeastSquaresMerge", "LowRankDelta", "SingularMergeError"]

DEFAULT_RIDGE = 1e-4
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
    Otherwise it is rounded, or its columns are orthonormal and belong to no task. Factors are float64 until
    [`rounded_deltas`] brings them to the dtype that is stored.
    """

    stacked: bool = True
    task_A: Tensor | None = None  # the tasks' own [A_1; …; A_T], (Σ r_t, in), where the blocks were asked for
    # [A*; A_t] C_t [A*; A_t]ᵀ of each block, float64, without the ridge, where solving gave them and rounding to
    # `A` changes nothing beyond what float32 resolves.
    moments: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class _Task:
    covariance: Covariance  # without the ridge
    weight: float
    deltas: Mapping[str, LowRankDelta]


class LeastSquaresMerge:
    """Merges the task deltas of layers that share one input.

        minimise over ΔW   Σ_t w_t ‖(ΔW − ΔW_t) C_t^½‖²_F
                           C_t ← C_t + λ · mean(diag C_t) · I
        solution           ΔW* = [B_1 … B_T] · A*,  R = Σ_t w_t C_t
                           A* = [w_1 A_1 C_1; …; w_T A_T C_T] R⁻¹

    The ridge `λ` pulls unseen directions to the tasks' mean delta. Adding tasks one at a time and solving after each
    is the recursion of recursive least squares in information form: every step gives the optimum over the tasks so
    far, and the order does not matter. All products and solves are float64, whatever dtype deltas and covariances are
    stored in, on the device, or on the CPU in place of one without float64 (Apple's "mps"); only what comes back is
    rounded. A GPU is waited for four times in a solve: for the traces, if nobody asked before, whether `R` could be
    factored, what rounding loses, and whether all is finite.

    A layer that a task did not train counts as a delta of zero there: leave it out of `deltas`.
    """

    def __init__(self, ridge: float = DEFAULT_RIDGE, device: torch.device | str = "cpu") -> None:
        self.ridge = ridge
        self.device = float64_device(device)
        self._tasks: list[_Task] = []

    def add(self, covariance: Covariance, deltas: Mapping[str, LowRankDelta], weight: float = 1.0) -> None:
        """Add one task: `C_t` of the shared input, without the ridge, its `ΔW_t` by the layer's name, and `w_t ≥ 0`.

        A width other than that of the tasks before is a `ValueError`: nothing else compares the inputs of a layer that
        only some tasks trained.
        """
        if self._tasks and self._tasks[0].covariance.width != covariance.width:
            raise ValueError(
                f"the covariance has width {covariance.width}, the one before {self._tasks[0].covariance.width}."
            )
        self._tasks.append(_Task(covariance.on(self.device), weight, dict(deltas)))

    def solve(
        self, rank: int | None = None, dtype: torch.dtype = torch.float32, keep_blocks: bool = False
    ) -> dict[str, MergedDelta]:
        """The merged delta of every layer, `A` of shape `(Σ r_t, in)` and `B` of `(out, Σ r_t)`, or of lower rank.

        They are float32, float16 or bfloat16, on the device. With a `rank`, the best delta of that rank under the same
        objective is `U Uᵀ ΔW*` with the `rank` leading left singular vectors `U` of `ΔW* R^½` (reduced-rank
        regression): it gives up what the tasks' inputs excite least, where plain SVD gives up the smallest weights.
        Where a task's delta has the layer's full rank, the merged one has that too and no more, unless `keep_blocks`.

        `keep_blocks`, without `rank`, gives back `task_A` too, and keeps `[B_1 … B_T]` also where the blocks are large
        and cancel: what then gets lost in rounding is small beside the tasks' deltas, if not beside the merged one.

        Raises `SingularMergeError` if a direction has no energy in any task and there is no ridge, and `OverflowError`
        if a merged delta is beyond the range of float16.
        """
        layers = self._merged(rank, keep_blocks)
        asked = [name for name, found in layers.items() if found.stacked and not keep_blocks]
        losses = numbers_of([rounding_loss(layers[name].A, layers[name].B, dtype) for name in asked])
        for name, (loss,) in zip(asked, losses):
            if loss > LARGEST_ROUNDING_LOSS[dtype]:  # the blocks are large and cancel
                layers[name] = MergedDelta(*orthonormal(layers[name].A, layers[name].B), stacked=False)
        return rounded_deltas(layers, dtype)

    def _parts(self) -> list[tuple[float, Covariance]]:
        """The `(w_t, C_t)` of `R`."""
        know_traces([task.covariance for task in self._tasks])
        ridged = [(task.weight, task.covariance.with_ridge(self.ridge)) for task in self._tasks]
        if any(task.weight * task.covariance.trace > 0 for task in self._tasks):
            return ridged
        # Nobody saw a token here: every direction is an unseen one, and these get the mean delta.
        return [(weight, _identity(part.width, self.device)) for weight, part in ridged]

    def _merged(self, rank: int | None, keep_blocks: bool) -> dict[str, MergedDelta]:
        """The merged delta of every layer in float64: the blocks of the tasks side by side, or cut to the rank."""
        parts = self._parts()
        own: dict[str, list[tuple[int, LowRankDelta]]] = {}  # by layer, of the tasks that trained it
        for t, task in enumerate(self._tasks):
            for name, delta in task.deltas.items():
                there = LowRankDelta(A=moved(delta.A, self.device), B=moved(delta.B, self.device))
                own.setdefault(name, []).append((t, there))
        blocks = [(t, delta.A) for deltas in own.values() for t, delta in deltas]
        if not blocks:
            return {}
        rows, seen = inverse_scatter_product(parts, blocks, self.device)
        places = iter(slices([len(A) for _, A in blocks]))
        layers = {}
        for name, deltas in own.items():
            placed = [(t, next(places)) for t, _ in deltas]
            whole = slice(placed[0][1].start, placed[-1][1].stop)
            A, B = rows[whole], torch.cat([delta.B for _, delta in deltas], dim=1)
            is_full = not keep_blocks and has_full_rank([len(delta.A) for _, delta in deltas], (len(B), A.shape[1]))
            if rank is not None and rank < (min(len(B), *A.shape) if is_full else len(A)):
                products = [parts[t][0] * parts[t][1].product(delta.A) for t, delta in deltas]
                layers[name] = MergedDelta(*compress(A, B, torch.cat(products), rank), stacked=False)
            elif is_full:
                layers[name] = MergedDelta(*of_full_rank(B.double() @ A), stacked=False)
            else:
                task_A = torch.cat([delta.A for _, delta in deltas]) if keep_blocks else None
                layers[name] = MergedDelta(A, B, task_A=task_A, moments=self._moments(placed, A, whole, seen))
        return layers

    def _moments(
        self, placed: Sequence[tuple[int, slice]], A: Tensor, whole: slice, seen: Seen | None
    ) -> list[Tensor] | None:
        """As in `MergedDelta`, of a layer's tasks and the places of their rows, without going over `S_t` again."""
        if seen is None or not all(self._tasks[t].weight * self._tasks[t].covariance.trace > 0 for t, _ in placed):
            return None
        found, products = [], A @ torch.cat([A, seen.rows[whole]]).T
        for t, own in placed:
            factor, rows = seen.factor(whole, own, t), seen.rows[own]
            side = products[:, len(A) + own.start - whole.start : len(A) + own.stop - whole.start]
            gram = symmetric(products[:, : len(A)], side, rows @ rows.T)
            found.append(torch.addmm(gram, factor, factor.T, beta=self._tasks[t].covariance.remainder))
        return found


def rounded_deltas(layers: Mapping[str, MergedDelta], dtype: torch.dtype) -> dict[str, MergedDelta]:
    """Merged deltas, by layer, as they are stored; `stacked` is kept only where `B` is not rounded by it.

    An entry beyond the range of the dtype is an `OverflowError`.
    """
    rounded, said = {}, []
    for name, layer in layers.items():
        A, B = layer.A.to(dtype), layer.B.to(dtype)
        own = None if layer.task_A is None else layer.task_A.to(dtype)
        rounded[name] = MergedDelta(A=A, B=B, task_A=own)
        # A sum is finite if all entries are; and entries that are not, do not cancel.
        totals = [part.sum(dtype=torch.float64) for part in (A, B, own) if part is not None]
        exact = totals[0].new_ones(()) if B.dtype == layer.B.dtype else (B.to(layer.B.dtype) == layer.B).all().double()
        said.append(torch.stack([exact, *totals]))
    for name, (exactly, *sums) in zip(layers, numbers_of(said)):
        if not all(map(math.isfinite, sums)):
            raise OverflowError(
                f"the merged '{name}' has entries beyond the range of {dtype}; pass `dtype=torch.bfloat16` or float32"
            )
        stacked = layers[name].stacked and bool(exactly)
        moments = layers[name].moments if stacked and dtype == torch.float32 else None
        rounded[name] = replace(rounded[name], stacked=stacked, moments=moments)
    return rounded


def has_full_rank(ranks: Sequence[int], shape: tuple[int, int]) -> bool:
    """Whether one of several deltas has the full rank of its layer, of shape `(out, in)`: blocks save nothing then."""
    return len(ranks) > 1 and max(ranks) >= min(shape)


def _identity(width: int, device: torch.device) -> Covariance:
    return LowRankCovariance(remainder=1.0, factor=torch.zeros(0, width, dtype=torch.float32, device=device))
