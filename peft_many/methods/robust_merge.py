"""RobustMerge: prune the factors, scale up what pruning took most of, and merge factor by factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..algebra.lpm import LowRankDelta
from .base import LayerTask, MergeMethod, check_finite, check_share, trained
from .ties import unpruned_is_fine


@dataclass(frozen=True)
class RobustMerge(MergeMethod):
    """Pruned factors with complementary scaling and cross-task normalisation, merged factor by factor.

        prune       Ã_t, B̃_t: the largest entries of A_t and of B_t
        scale       S_t = diag_i( Σ_j |A_t[i, j]| / Σ_j |Ã_t[i, j]| ),   S̃_t = S_t / Σ_t S_t
        merge       ΔW = λ (Σ_t B̃_t S̃_t)(Σ_t w_t Ã_t)

    A delta of the tasks' largest rank; a task of lower rank takes no part in the rows that it lacks, nor does one in a
    row that pruning emptied. `A_t` meets the `B` of other tasks, so this depends on the factors and not only on
    their product: it supposes adapters that were initialised alike. float64.

    These are the paper's equations. The authors' code also lifts the smaller 80 % of each `S_t` to their upper bound,
    and applies `λ` to both factors.

    Args:
        density (`float`, defaults to `0.2`): The share of entries of each factor to keep, as in the paper's code.
        scaling (`float`, defaults to `2.0`): `λ`, the paper's.
    """

    density: float = 0.2
    scaling: float = 2.0

    name = "robust_merge"
    source = "RobustMerge, arXiv 2502.17159"

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_finite("scaling", self.scaling)

    def rank_of(self, ranks: Sequence[int]) -> int:
        return max(ranks)

    def merge(self, tasks: Sequence[LayerTask], layer: str = "") -> LowRankDelta:
        """`B = Σ_t B̃_t S̃_t`, `A = λ Σ_t w_t Ã_t`."""
        from peft.utils.merge_utils import prune  # when merging, or what reads records would need PEFT

        tasks = trained(tasks)
        rank = self.rank_of([task.delta.A.shape[0] for task in tasks])
        first = tasks[0].delta
        A = first.A.new_zeros(rank, first.A.shape[1], dtype=torch.float64)
        B = first.B.new_zeros(first.B.shape[0], rank, dtype=torch.float64)
        total = first.A.new_zeros(rank, dtype=torch.float64)
        for task in tasks:
            whole, r = task.delta.A.double(), task.delta.A.shape[0]
            with unpruned_is_fine():
                pruned = prune(whole, self.density, method="magnitude")
                columns = prune(task.delta.B.double(), self.density, method="magnitude")
            left = pruned.abs().sum(1)
            scale = torch.where(left > 0, whole.abs().sum(1) / left, 0.0)
            A[:r] += self.scaling * task.weight * pruned
            B[:, :r] += columns * scale
            total[:r] += scale
        return LowRankDelta(A=A, B=torch.where(total > 0, B / total, 0.0))
