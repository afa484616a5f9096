"""Whether tasks can be merged with one another: checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from ..files.adapter import Adapter, TaskAdapter
from ..files.statistics import group_by_input
from ..files.stored_delta import UnmergeableAdapterError


def check_tasks(tasks: Sequence[TaskAdapter]) -> None:
    """No task twice, be it by name or by content; weights that leave something to merge."""
    by_hash: dict[str, TaskAdapter] = {}
    by_name: dict[str, TaskAdapter] = {}
    for task in tasks:
        for sha256 in (task.origin.sha256, *(within.sha256 for within in task.origin.pooled)):
            same = by_hash.setdefault(sha256, task)
            if same is not task:
                raise UnmergeableAdapterError(f"The same adapter is given twice: {same.source} and {task.source}.")
        same = by_name.setdefault(task.name, task)
        if same is not task:
            raise UnmergeableAdapterError(
                f"Two tasks are called '{task.name}': {same.source} and {task.source}. Pass `task_names` to tell them "
                "apart (for a merge, a list of its tasks' names)."
            )
        if not 0.0 <= task.weight < float("inf"):
            raise ValueError(f"The weight of {task.source} is {task.weight}; weights must be finite and not negative.")
    if all(task.weight == 0 for task in tasks):
        raise ValueError("All weights are zero, so there is nothing to merge.")


def check_same_base(adapters: Sequence[Adapter]) -> None:
    """No two adapters name different base models."""
    names = {adapter.config.base_model_name_or_path: adapter for adapter in adapters}
    names.pop(None, None)
    names.pop("", None)
    if len(names) > 1:
        (one, first), (two, second) = list(names.items())[:2]
        raise UnmergeableAdapterError(
            f"The adapters were trained on different base models: {first.tasks[0].source} on '{one}', "
            f"{second.tasks[0].source} on '{two}'. If these are the same model, make `base_model_name_or_path` in "
            "their adapter_config.json agree."
        )


def shared_inputs(tasks: Sequence[TaskAdapter]) -> list[list[str]]:
    """The layers that any task trained, those that share their input in every task together; shapes are checked."""
    shapes: dict[str, tuple[tuple[int, int], TaskAdapter]] = {}
    for task in tasks:
        for module, delta in task.deltas.items():
            shape = delta.shape
            first_shape, first = shapes.setdefault(module, (shape, task))
            if shape != first_shape:
                raise UnmergeableAdapterError(
                    f"'{module}' is {first_shape[0]} x {first_shape[1]} in {first.source}, but "
                    f"{shape[0]} x {shape[1]} in {task.source}: they were trained on different base models."
                )
    return group_by_input(sorted(shapes), [task.statistics for task in tasks])


def check_whole_projectors(tasks: Sequence[TaskAdapter], projectors: Sequence[str]) -> None:
    """A projector that one task trained whole must not be one of which another trained a part."""
    for projector in projectors:
        for task in tasks:
            inner = next((n for n in (*task.deltas, *task.projectors) if n.startswith(f"{projector}.")), None)
            if inner is not None:
                raise UnmergeableAdapterError(
                    f"{task.source} trained '{inner}', a part of the projector '{projector}' that other adapters "
                    "trained whole; these cannot be merged."
                )
