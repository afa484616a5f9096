"""What was done to a merge, in its order: every operation adds a line to the record in its config."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ..files.adapter import Adapter
from ..records import MergeOptions, Operation
from ..version import __version__

MERGE, ADD, REMOVE, CHANGE, POOL, REFIT = "merge", "add", "remove", "change", "pool", "refit"


def operation(kind: str, tasks: Sequence[str], options: Mapping[str, object], forgotten: int = 0) -> Operation:
    """One line of the record, of what is done now; options that are `None` are left out."""
    known = {name: value for name, value in options.items() if value is not None}
    return Operation(kind, sorted(tasks), known, __version__, forgotten)


def operations_of(adapters: Sequence[Adapter], without: Sequence[str], options: MergeOptions) -> list[Operation]:
    """The record of a merge that is made of these adapters as they were read: theirs, and what is done now.

    The names of the tasks that are left out leave the record too.
    """
    record = []
    left_out = [task for adapter in adapters for task in adapter.tasks if task.name in without]
    gone = {*without, *(inner.name for task in left_out for inner in task.origin.pooled)}
    for adapter in sorted(adapters, key=lambda adapter: min(task.name for task in adapter.tasks)):
        names = dict(zip(adapter.merge.names if adapter.merge else (), [task.name for task in adapter.tasks]))
        for line in adapter.operations:
            if line.kind != REFIT:  # which merging anew undoes
                record.append(_with_names(line, names, gone))
    merged = [task.name for adapter in adapters if adapter.merge for task in adapter.tasks]
    added = [task.name for adapter in adapters if not adapter.merge for task in adapter.tasks]
    if sum(adapter.merge is not None for adapter in adapters) != 1:
        kind, tasks = MERGE, [*merged, *added]
    elif added:
        kind, tasks = ADD, added
    elif without:
        kind, tasks = REMOVE, []
    else:
        kind, tasks = CHANGE, merged
    kept = [task for task in tasks if task not in without]
    return [*record, operation(kind, kept, options.describe(), forgotten=len({*without} & {*merged}))]


def _with_names(line: Operation, names: Mapping[str, str], gone: Collection[str]) -> Operation:
    """A line of an earlier record with the tasks' names of now, and without those of tasks that are forgotten."""
    tasks = [names.get(task, task) for task in line.tasks]
    kept = [task for task in tasks if task not in gone]
    return replace(line, tasks=kept, forgotten=line.forgotten + len(tasks) - len(kept))
