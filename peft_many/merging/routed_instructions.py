"""The router of instructions in a merge whose gates go by them: every task's prototype, and one metric for all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..algebra.spread import FeatureMetric
from ..files.adapter import TaskAdapter
from ..files.errors import UnmergeableAdapterError
from ..files.stored_features import FeatureStatistics
from ..records import INSTRUCTION_ROUTER, RoutedInstructions
from .checks import check_same_shape
from .routed_projectors import feature_metric, own_distances, router_tensors

# Tokens have the length one. What may always vary, so that an instruction in other words than a task's, or behind
# words that are new to all of them, is not infinitely far from it: chosen on 29 tasks by their words (docs/method.md).
LEAST_VARIANCE = 0.005


def instruction_metric(asked: Sequence[FeatureStatistics]) -> FeatureMetric:
    """The metric in which instructions are compared with the tasks'; each of which has a spread."""
    return feature_metric(asked, least=LEAST_VARIANCE / len(asked[0].prototype))


def route_instructions(tasks: Sequence[TaskAdapter]) -> tuple[RoutedInstructions, dict[str, Tensor]]:
    """What the config and the weights file of a merge say of its instructions; tasks of weight 0 take no part."""
    routed = [task for task in tasks if task.weight > 0]
    found: list[FeatureStatistics] = []
    for task in routed:
        asked = task.statistics.instructions
        if asked is None or asked.spread is None:
            raise UnmergeableAdapterError(
                f"{task.source} has no statistics of its instructions, which `gate_by` needs: "
                + ("none was measured" if asked is None else "a single one was measured")
                + ". Run `collect_statistics` again, with batches of token ids, or pass `gate_by='images'`."
            )
        found.append(asked)
    check_same_shape("The width of the instructions' features", zip(routed, [len(one.prototype) for one in found]))
    width = len(found[0].prototype)
    metric = instruction_metric(found)
    tensors = router_tensors(INSTRUCTION_ROUTER, [one.prototype for one in found], metric)
    record = RoutedInstructions(
        width, [task.name for task in routed], len(metric.directions), own_distances(found, metric)
    )
    return record, tensors
