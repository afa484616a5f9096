"""The router of instructions in a merge whose gates go by them: every task's prototype, and one metric for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.spread import shared_metric
from ..algebra.sums import mean_covariance
from ..files.adapter import TaskAdapter
from ..files.errors import UnmergeableAdapterError
from ..files.tensor_keys import INSTRUCTION_ROUTER
from ..records import RoutedInstructions
from .checks import check_same_shape

# Tokens have the length one. What may always vary, so that an instruction in other words than a task's, or behind
# words that are new to all of them, is not infinitely far from it: chosen on 29 tasks by their words (docs/method.md).
LEAST_VARIANCE = 0.005


def route_instructions(tasks: Sequence[TaskAdapter]) -> tuple[RoutedInstructions, dict[str, Tensor]]:
    """What the config and the weights file of a merge say of its instructions; tasks of weight 0 take no part."""
    routed = [task for task in tasks if task.weight > 0]
    found, spreads = [], []
    for task in routed:
        asked = task.statistics.instructions
        if asked is None or asked.spread is None:
            raise UnmergeableAdapterError(
                f"{task.source} does not say what its instructions are like, which `gate_by` goes by: "
                + ("none was measured" if asked is None else "a single one was measured")
                + ". Run `collect_statistics` again, with batches of token ids, or pass `gate_by='images'`."
            )
        found.append(asked)
        spreads.append(asked.spread)
    check_same_shape("The width of the instructions' features", zip(routed, [len(one.prototype) for one in found]))
    width = len(found[0].prototype)
    counts = [one.count for one in found]
    metric = shared_metric(spreads, counts, least=LEAST_VARIANCE / width)
    # Of each task, as some ask in few words and others in any; at least those of all tasks together.
    least = max(1.0, metric.mean_distance(mean_covariance(spreads, counts)))
    distances = [max(least, metric.mean_distance(spread)) for spread in spreads]
    tensors = {
        "prototypes": torch.stack([one.prototype.float() for one in found]),
        "directions": metric.directions.float().contiguous(),
        "variances": metric.variances.float(),
    }
    record = RoutedInstructions(width, [task.name for task in routed], len(metric.directions), distances)
    return record, {f"{INSTRUCTION_ROUTER}.{name}": tensor for name, tensor in tensors.items()}
