"""Which tasks of the adapters take part in a merge, and with what weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ..files.adapter import Adapter, TaskAdapter
from ..files.errors import UnmergeableAdapterError

# One for each adapter, which multiplies its tasks' own; or by task name, in place of its own.
TaskWeights = Sequence[float] | Mapping[str, float] | None


def select_tasks(adapters: Sequence[Adapter], weights: TaskWeights, without: Collection[str]) -> list[Adapter]:
    """The adapters with those of their tasks that take part, which have the weights that they have in the merge."""
    by_name: Mapping[str, float] = {}
    factors: Sequence[float] = [1.0] * len(adapters)
    if isinstance(weights, Mapping):
        by_name = weights
    elif weights is not None:
        factors = weights
    _check_known(by_name, adapters, "weigh")
    _check_known(without, adapters, "remove")
    selected = []
    for adapter, factor in zip(adapters, factors):
        tasks = [
            replace(task, weight=float(by_name.get(task.name, factor * task.weight)))
            for task in adapter.tasks
            if task.name not in without
        ]
        _check_projectors_are_kept(tasks)
        _check_means_stay(adapter, tasks)
        if tasks:
            selected.append(_with_tasks(adapter, tasks))
    if not selected:
        raise ValueError("Without these tasks, none is left to merge.")
    return selected


def _with_tasks(adapter: Adapter, tasks: Sequence[TaskAdapter]) -> Adapter:
    """The adapter with some of its tasks; if layers fall away with the others, its config says so."""
    config, layers = adapter.config, {module for task in tasks for module in task.deltas}
    if layers != {module for task in adapter.tasks for module in task.deltas}:
        config = copy.copy(config)
        config.target_modules = sorted(layers)  # its own words would adapt layers that nobody trained
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return replace(adapter, config=config, tasks=tuple(tasks))


def _check_known(names: Collection[str], adapters: Sequence[Adapter], what_for: str) -> None:
    tasks = [task for adapter in adapters for task in adapter.tasks]
    known = [task.name for task in tasks]
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        for task in tasks:
            if any(within.name == unknown for within in task.origin.pooled):
                raise UnmergeableAdapterError(
                    f"The task '{unknown}' is part of the pool '{task.name}' ({task.source}), which cannot be taken "
                    "apart: its tasks can be neither forgotten nor weighted one by one."
                )
        raise ValueError(f"There is no task '{unknown}' to {what_for}; the tasks are {', '.join(map(repr, known))}.")


def _check_projectors_are_kept(tasks: Sequence[TaskAdapter]) -> None:
    for task in tasks:
        left_out = task.origin.projectors_left_out
        if task.weight > 0 and left_out:
            raise UnmergeableAdapterError(
                f"{task.source} had the weight 0, so its projector '{left_out[0]}' was not kept, and it can get no "
                "other weight. Remove the task and merge its own adapter with the rest."
            )


def _check_means_stay(adapter: Adapter, tasks: Sequence[TaskAdapter]) -> None:
    """A mean of projectors stays right only if its tasks keep the ratios of their weights, and all or none stay."""
    weights = {task.name: task.weight for task in tasks}
    for projector in adapter.averaged_projectors:
        heard = [task for task in adapter.tasks if projector in task.projectors and task.weight > 0]
        ratios = [weights.get(task.name, 0.0) / task.weight for task in heard]
        if not all(math.isclose(ratio, ratios[0], abs_tol=1e-12) for ratio in ratios):
            gone = next((task for task in heard if task.name not in weights), None)
            raise UnmergeableAdapterError(
                f"{(gone or heard[0]).source} cannot {'be taken out' if gone else 'get this weight'}: the projector "
                f"'{projector}' is the mean of several tasks' projectors by their old weights, and their own are not "
                "kept. Merge the tasks' adapters anew."
            )
