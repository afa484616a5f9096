"""Which tasks of the adapters take part in a merge, and with what weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..files.adapter import Adapter, TaskAdapter
from ..files.stored_delta import UnmergeableAdapterError

# One for each adapter, which multiplies its tasks' own; or by task name, in place of its own.
TaskWeights = Sequence[float] | Mapping[str, float] | None


def weighted_tasks(adapters: Sequence[Adapter], weights: TaskWeights) -> list[TaskAdapter]:
    """The tasks of all adapters with the weights that they have in the merge.

    Raises:
        ValueError: There is no task of that name, or it is part of a pool.
        UnmergeableAdapterError: A mean of projectors would have to be taken again with other weights, or a task had
            the weight 0 when its projector would have been written.
    """
    if isinstance(weights, Mapping):
        _check_known(weights, adapters, "`weights`")
        tasks = [
            [replace(task, weight=float(weights.get(task.name, task.weight))) for task in adapter.tasks]
            for adapter in adapters
        ]
        for adapter, weighted in zip(adapters, tasks):
            _check_projectors_are_kept(weighted)
            _check_same_mean(adapter, weighted)
        return [task for weighted in tasks for task in weighted]
    factors = weights if weights is not None else [1.0] * len(adapters)
    return [
        replace(task, weight=factor * task.weight)
        for adapter, factor in zip(adapters, factors)
        for task in adapter.tasks
    ]


def without_tasks(
    adapters: Sequence[Adapter], tasks: Sequence[TaskAdapter], names: Sequence[str]
) -> tuple[list[Adapter], list[TaskAdapter]]:
    """Leave out the tasks of these names, as if they had never been merged.

    Args:
        adapters (`Sequence[Adapter]`): As they were read.
        tasks (`Sequence[TaskAdapter]`): All their tasks, with their weights in the merge.
        names (`Sequence[str]`): Names of tasks.

    Returns:
        The adapters and tasks that remain.

    Raises:
        ValueError: There is no task of that name, or none would be left.
        UnmergeableAdapterError: A projector that remains is a mean that a task has a part in.
    """
    if not names:
        return list(adapters), list(tasks)
    _check_known(names, adapters, "`without`")
    kept = [task for task in tasks if task.name not in names]
    if not kept:
        raise ValueError("Without these tasks, none is left to merge.")
    return [left for adapter in adapters if (left := _left_of(adapter, names)) is not None], kept


def _left_of(adapter: Adapter, names: Sequence[str]) -> Adapter | None:
    left = tuple(task for task in adapter.tasks if task.name not in names)
    if len(left) == len(adapter.tasks):
        return adapter
    if not left:
        return None
    for projector, averaged in adapter.averaged_projectors.items():
        gone = [task for task in adapter.tasks if task.name in names and projector in task.projectors]
        if gone and len(averaged) > 1:
            raise UnmergeableAdapterError(
                f"{gone[0].source} cannot be taken out: the projector '{projector}' is the mean of several tasks' "
                "projectors, and their own are not kept. Merge the other tasks' adapters anew."
            )
    layers = {module for task in left for module in task.deltas}
    config = adapter.config
    if layers != {module for task in adapter.tasks for module in task.deltas}:
        config = copy.copy(config)
        config.target_modules = sorted(layers)  # its own words would adapt layers that nobody trained
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return replace(adapter, config=config, tasks=left)


def _check_known(names: Sequence[str] | Mapping[str, float], adapters: Sequence[Adapter], option: str) -> None:
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
        raise ValueError(f"{option} names the task '{unknown}', but the tasks are {', '.join(map(repr, known))}.")


def _check_projectors_are_kept(weighted: Sequence[TaskAdapter]) -> None:
    for task in weighted:
        left_out = task.origin.projectors_left_out
        if task.weight > 0 and left_out:
            raise UnmergeableAdapterError(
                f"{task.source} had the weight 0, so its projector '{left_out[0]}' was not kept, and it can get no "
                "other weight. Remove the task and merge its own adapter with the rest."
            )


def _check_same_mean(adapter: Adapter, weighted: Sequence[TaskAdapter]) -> None:
    """A mean of projectors stays right only if the weights of the tasks in it keep their ratios."""
    for projector in adapter.averaged_projectors:
        ratios = [
            new.weight / old.weight
            for old, new in zip(adapter.tasks, weighted)
            if projector in old.projectors and old.weight > 0
        ]
        if not all(math.isclose(ratio, ratios[0], abs_tol=1e-12) for ratio in ratios):
            raise UnmergeableAdapterError(
                f"{adapter.tasks[0].source}: the projector '{projector}' is the mean of several tasks' projectors by "
                "their old weights, and their own are not kept. Merge the tasks' adapters anew."
            )
