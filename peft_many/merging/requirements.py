"""What a merge needs to have measured of its tasks: checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..files.adapter import Adapter, TaskAdapter
from ..files.stored_delta import UnmergeableAdapterError
from ..methods import without_statistics
from ..records import MergeOptions, RoutedProjector
from ..records.options import ROUTED


def check_measured(adapters: Sequence[Adapter], tasks: Sequence[TaskAdapter], options: MergeOptions) -> None:
    """The tasks' statistics must hold what the method and the routing of projectors need.

    Raises:
        UnmergeableAdapterError: Something is missing; the message says what would do without.
    """
    if options.merge_method is None or options.merge_method.needs_covariances:
        for task in tasks:
            _check_covariances(task)
    if options.projectors == ROUTED:
        projectors = sorted({name for task in tasks for name in task.projectors})
        for task in tasks:
            _check_prototypes(task, projectors)
        for adapter in adapters:
            _check_own_projectors(adapter)


def check_can_gate(routing: Mapping[str, RoutedProjector]) -> None:
    """A gate goes by the tasks' prototypes.

    Raises:
        UnmergeableAdapterError: There is none.
    """
    if not routing:
        raise UnmergeableAdapterError(
            "`gate_lora` goes by the tasks' visual prototypes, but none of the adapters has one: no image passed "
            "while their statistics were collected."
        )


def _check_covariances(task: TaskAdapter) -> None:
    if not task.statistics.is_measured:
        raise UnmergeableAdapterError(
            f"{task.source} has no statistics: load it, run `collect_statistics(model, dataloader)` on its task's "
            f"data, and save it again; or merge by a method that needs none ({', '.join(without_statistics())})."
        )
    module = next((module for module in task.deltas if module not in task.statistics.input_of), None)
    if module is not None:
        raise UnmergeableAdapterError(
            f"{task.source} trained '{module}', but its statistics hold no covariance for it; "
            "run `collect_statistics` again."
        )


def _check_prototypes(task: TaskAdapter, projectors: Sequence[str]) -> None:
    if projectors and not task.statistics.is_measured:
        raise UnmergeableAdapterError(
            f"{task.source} has no statistics, so images cannot be routed to its task's projector '{projectors[0]}': "
            "run `collect_statistics` on it, or pass `projectors='mean'`."
        )
    for projector in task.projectors:
        if projector not in task.statistics.projectors:
            raise UnmergeableAdapterError(
                f"{task.source} trained the projector '{projector}', but its statistics hold no visual prototype: no "
                "image passed while they were collected. `projectors='mean'` needs none."
            )


def _check_own_projectors(adapter: Adapter) -> None:
    """Routing needs each task's own projector, which a merge with averaged projectors no longer has."""
    averaged = adapter.averaged_projectors
    if averaged:
        raise UnmergeableAdapterError(
            f"{adapter.tasks[0].source}: the projector '{next(iter(averaged))}' is the mean of several tasks' "
            "projectors, so their own cannot be routed. Pass `projectors='mean'`, or merge the tasks' own adapters."
        )
