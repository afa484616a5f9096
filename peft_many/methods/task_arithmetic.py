"""Task arithmetic: a scaled sum of the deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..algebra.lpm import LowRankDelta
from .average import weighted_sum
from .base import LayerTask, MergeMethod, check_finite


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    """The scaled sum of the weight changes, `ΔW = λ Σ_t w_t ΔW_t`, exactly. float64.

    Args:
        scaling (`float`, defaults to `0.4`):
            `λ`. The paper tunes it on held-out data; 0.4 is what TIES (arXiv 2306.01708) takes for it without any.
    """

    scaling: float = 0.4

    name = "task_arithmetic"
    source = "Task arithmetic, arXiv 2212.04089 (learning via addition)"

    def __post_init__(self) -> None:
        check_finite("scaling", self.scaling)

    def merge(self, tasks: Sequence[LayerTask], layer: str = "") -> LowRankDelta:
        """`B = [B_1 … B_T]`, `A = λ [w_1 A_1; …; w_T A_T]`."""
        return weighted_sum(tasks, [self.scaling * task.weight for task in tasks])
