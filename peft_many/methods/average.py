"""The mean of the deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..algebra.lpm import LowRankDelta
from .base import LayerTask, MergeMethod


@dataclass(frozen=True)
class Average(MergeMethod):
    """The weighted mean of the weight changes, `ΔW = Σ_t w_t ΔW_t / Σ_t w_t`, exactly; one task comes back as it was.

    It is the mean of the fine-tuned models, so a task that did not train the layer counts as a delta of zero. Not to
    be confused with the mean of the factors `A` and of the factors `B` (PEFT's `"linear"`). float64.
    """

    name = "average"
    source = "Model soups, arXiv 2203.05482 (uniform soup)"

    def merge(self, tasks: Sequence[LayerTask], layer: str = "") -> LowRankDelta:
        """`B = [B_1 … B_T]`, `A = [w_1 A_1; …; w_T A_T] / Σ_t w_t`."""
        total = sum(task.weight for task in tasks)
        return weighted_sum(tasks, [task.weight / total for task in tasks])


def weighted_sum(tasks: Sequence[LayerTask], factors: Sequence[float]) -> LowRankDelta:
    """`Σ_t f_t ΔW_t` as one low-rank delta whose `B` is the tasks' side by side."""
    A = torch.cat([factor * task.delta.A.double() for task, factor in zip(tasks, factors)])
    return LowRankDelta(A=A, B=torch.cat([task.delta.B for task in tasks], dim=1))
