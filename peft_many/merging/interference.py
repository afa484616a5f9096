"""What merging costs each task before any evaluation, found while the deltas are at hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

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
    return LowRankDelta(A=delta.rows(), B=delta.columns()), task.statistics.covariances.get(module)


def mean_residuals(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """By task the mean over layers, from what was recorded of each group of layers; four digits are kept."""
    by_task: dict[str, list[float]] = {}
    for record in records:
        for residuals in record["residuals"].values():
            for task, residual in residuals.items():
                by_task.setdefault(task, []).append(residual)
    return {task: float(f"{math.fsum(found) / len(found):.4g}") for task, found in by_task.items()}
