"""What merging costs each task before any evaluation, found while the deltas are at hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from ..algebra.covariance import Covariance
from ..algebra.lpm import LowRankDelta, MergedDelta
from ..algebra.residual import relative_residuals
from ..files.adapter import TaskAdapter
from .prepare import PreparedMerge


def layer_residuals(plan: PreparedMerge, module: str, merged: MergedDelta) -> dict[str, float]:
    """By task that trained a layer, [`relative_residuals`]; without those whose inputs nobody measured there."""
    tasks = [task for task in plan.tasks if module in task.deltas]
    found = relative_residuals(merged, [_measured(task, module) for task in tasks])
    return {task.name: residual for task, residual in zip(tasks, found) if not math.isnan(residual)}


def _measured(task: TaskAdapter, module: str) -> tuple[LowRankDelta, Covariance | None]:
    """What merging has checked already."""
    delta = task.deltas[module]
    return LowRankDelta(A=delta.rows(), B=delta.columns()), task.statistics.covariance_of(module)


def mean_residuals(residuals: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By task the mean over layers, from each layer's residuals by task; four digits are kept."""
    by_task: dict[str, list[float]] = {}
    for of_layer in residuals:
        for task, residual in of_layer.items():
            by_task.setdefault(task, []).append(residual)
    return {task: float(f"{math.fsum(found) / len(found):.4g}") for task, found in by_task.items()}
