"""CPM's part of a merge: every task's projector and prototype side by side, and how images will be compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.spread import FeatureMetric, new_distances, shared_metric
from ..files.adapter import TaskAdapter
from ..files.errors import UnmergeableAdapterError
from ..files.stored_features import FeatureStatistics
from ..records import RoutedProjector, RoutedTask
from .checks import check_same_shape
from .mean_projectors import check_same_tensors


def route_projectors(
    tasks: Sequence[TaskAdapter], router: str, untrained_too: bool = False
) -> tuple[dict[str, RoutedProjector], dict[str, Tensor]]:
    """What the config and the weights file of a merge say of routed projectors; tasks that saw no image take no part.

    With `untrained_too` projectors that no task trained are routed as well, for what a gate learns from them. The
    tensors, by key, stay on disk.
    """
    routing: dict[str, RoutedProjector] = {}
    tensors: dict[str, Tensor] = {}
    names = {name for task in tasks for name in task.projectors}
    if untrained_too:
        adapted = {module for task in tasks for module in task.deltas}
        seen = {name for task in tasks for name in task.statistics.projectors}
        names |= {name for name in seen if not any(module.startswith(f"{name}.") for module in adapted)}
    for projector in sorted(names):
        routed = [task for task in tasks if projector in task.statistics.projectors and task.weight > 0]
        if not routed:
            continue
        measured = [task.statistics.projectors[projector] for task in routed]
        prototypes = [one.prototype for one in measured]
        check_same_shape(f"The width of the features at '{projector}'", zip(routed, map(len, prototypes)))
        check_same_tensors(projector, [task for task in routed if projector in task.projectors])
        metric = distances = None
        if router == "gaussian":
            _check_spreads(projector, routed)
            metric = feature_metric(measured)
            distances = own_distances(measured, metric)
        tensors |= router_tensors(projector, prototypes, metric)
        directions = None if metric is None else len(metric.directions)
        named = [RoutedTask(task.name, trained=projector in task.projectors) for task in routed]
        routing[projector] = RoutedProjector(len(prototypes[0]), named, directions, distances)
        for t, task in enumerate(routed):
            for key, tensor in task.projectors.get(projector, {}).items():
                tensors[f"{projector}.experts.task_{t}.{key}"] = tensor
    return routing, tensors


def router_tensors(name: str, prototypes: Sequence[Tensor], metric: FeatureMetric | None) -> dict[str, Tensor]:
    """What a router compares with, by key in the weights file, float32."""
    tensors = {f"{name}.prototypes": torch.stack([prototype.float() for prototype in prototypes])}
    if metric is not None:
        tensors[f"{name}.directions"] = metric.directions.float().contiguous()
        tensors[f"{name}.variances"] = metric.variances.float()
    return tensors


def _check_spreads(projector: str, tasks: Sequence[TaskAdapter]) -> None:
    for task in tasks:
        if task.statistics.projectors[projector].spread is None:
            raise UnmergeableAdapterError(
                f"{task.source} has no covariance of its images at '{projector}', which `router='gaussian'` needs: a "
                "single one was measured. Run `collect_statistics` again with more samples, or pass "
                "`router='cosine'`."
            )


def feature_metric(seen: Sequence[FeatureStatistics], least: float = 0.0) -> FeatureMetric:
    """The metric in which features are compared with those of tasks, by the tasks' spreads; see [`shared_metric`]."""
    known = [(one.spread, one.count) for one in seen if one.spread is not None]
    return shared_metric([spread for spread, _ in known], [count for _, count in known], least=least)


def own_distances(seen: Sequence[FeatureStatistics], metric: FeatureMetric) -> list[float]:
    """The squared distance of each task's own new features from its prototype, on average."""
    spreads = [one.spread for one in seen if one.spread is not None]
    return new_distances(metric, spreads, [one.count for one in seen])
