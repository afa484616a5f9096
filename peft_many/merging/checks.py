"""Whether tasks can be merged: with one another, by the method and with routed projectors. Nothing is computed yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..files.adapter import Adapter, TaskAdapter
from ..files.errors import UnmergeableAdapterError
from ..methods import without_statistics
from ..records import MergeOptions
from ..records.options import ROUTED


def check_tasks(tasks: Sequence[TaskAdapter]) -> None:
    """No task twice, be it by name or by content; weights that leave something to merge."""
    by_hash: dict[str, TaskAdapter] = {}
    by_name: dict[str, TaskAdapter] = {}
    for task in tasks:
        for sha256 in (task.origin.sha256, *(within.sha256 for within in task.origin.pooled)):
            same = by_hash.setdefault(sha256, task)
            if same is not task:
                raise UnmergeableAdapterError(
                    f"The same adapter is given twice: {same.source} and {task.source}. Leave one of them out."
                )
        same = by_name.setdefault(task.name, task)
        if same is not task:
            raise UnmergeableAdapterError(
                f"Two tasks are called '{task.name}': {same.source} and {task.source}. Pass `task_names` to tell them "
                "apart (for a merge, a list of its tasks' names), on the command line `--name ADAPTER=TASK`."
            )
        if not 0.0 <= task.weight < float("inf"):
            raise ValueError(f"The weight of {task.source} is {task.weight}; weights must be finite and not negative.")
    if all(task.weight == 0 for task in tasks):
        raise ValueError("All weights are zero, so there is nothing to merge.")


def check_same_shape(what: str, found: Iterable[tuple[TaskAdapter, Any]]) -> None:
    """All tasks must have the same shape of something, or whatever else a base model decides."""
    (first, expected), *others = found
    for task, shape in others:
        if shape != expected:
            raise UnmergeableAdapterError(
                f"{what} is {expected} in {first.source}, but {shape} in {task.source}: they were trained on "
                "different base models."
            )


def check_measured(adapters: Sequence[Adapter], tasks: Sequence[TaskAdapter], options: MergeOptions) -> None:
    """The tasks' statistics must hold what the method and the routing need; errors say what would do without."""
    if options.merge_method is None or options.merge_method.needs_covariances:
        for task in tasks:
            _check_covariances(task)
        _check_weighed_alike(tasks)
    if options.projectors == ROUTED:
        projectors = sorted({name for task in tasks for name in task.projectors})
        for task in tasks:
            _check_prototypes(task, projectors)
        for adapter in adapters:
            averaged = adapter.averaged_projectors
            if averaged:
                raise UnmergeableAdapterError(
                    f"{adapter.tasks[0].source}: the projector '{next(iter(averaged))}' is the mean of several tasks' "
                    "projectors, so their own cannot be routed. Pass `projectors='mean'`, or merge the tasks' own "
                    "adapters."
                )


def _check_covariances(task: TaskAdapter) -> None:
    if not task.statistics.is_measured:
        raise UnmergeableAdapterError(
            f"{task.source} has no statistics. Measure it on data of its task: `peft-many measure ADAPTER --data FILE "
            "--output FOLDER`, in Python `measure_adapter` or `collect_statistics`. Or merge by a method "
            f"that needs none ({', '.join(without_statistics())}), with averaged projectors: `method='average', "
            "projectors='mean'`, on the command line `--method average --projectors mean`."
        )
    module = next((module for module in task.deltas if module not in task.statistics.input_of), None)
    if module is not None:
        raise UnmergeableAdapterError(
            f"{task.source} trained '{module}', but its statistics hold no covariance for it; "
            "run `collect_statistics` again."
        )


def _check_weighed_alike(tasks: Sequence[TaskAdapter]) -> None:
    """Weighed and plain covariances are of different scales: one kind would count for nothing."""
    weighed, plain = ([task for task in tasks if task.statistics.weighed is is_so] for is_so in (True, False))
    if weighed and plain:
        raise UnmergeableAdapterError(
            f"{weighed[0].source} was measured with `weigh_tokens=True` and {plain[0].source} without, so that their "
            "covariances cannot be compared; run `collect_statistics` on one of them again, as for the other."
        )


def _check_prototypes(task: TaskAdapter, projectors: Sequence[str]) -> None:
    if projectors and not task.statistics.is_measured:
        raise UnmergeableAdapterError(
            f"{task.source} has no statistics, so images cannot be routed to its task's projector '{projectors[0]}': "
            "run `collect_statistics` on it (`peft-many measure ADAPTER --data FILE --output FOLDER`), or average the "
            "projectors: `projectors='mean'`, on the command line `--projectors mean`."
        )
    for projector in task.projectors:
        if projector not in task.statistics.projectors:
            raise UnmergeableAdapterError(
                f"{task.source} trained the projector '{projector}', but its statistics hold no visual prototype: no "
                "image passed while they were collected. `projectors='mean'` (`--projectors mean`) needs none."
            )


def check_whole_projectors(tasks: Sequence[TaskAdapter], projectors: Sequence[str]) -> None:
    """A projector that one task trained whole must not be one of which another trained a part."""
    for projector in projectors:
        for task in tasks:
            inner = next((n for n in (*task.deltas, *task.projectors) if n.startswith(f"{projector}.")), None)
            if inner is not None:
                raise UnmergeableAdapterError(
                    f"{task.source} trained '{inner}', a part of the projector '{projector}' that other adapters "
                    "trained whole: it cannot be merged with them."
                )
