"""What was done to a merge, in its order: every operation adds a line to the record in its config."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..files.adapter import Adapter
from ..tuner.config import MAnyConfig
from ..version import __version__

MERGE, ADD, REMOVE, CHANGE, POOL, REFIT = "merge", "add", "remove", "change", "pool", "refit"


def operation(kind: str, tasks: Sequence[str], options: Mapping[str, Any], forgotten: int = 0) -> dict[str, Any]:
    """One line of the record.

    Args:
        kind (`str`): What was done.
        tasks (`Sequence[str]`): The tasks that took part in it and are still there.
        options (`Mapping[str, Any]`): With what options; those that are `None` are left out.
        forgotten (`int`): How many other tasks took part, of which not even the name is kept.
    """
    line = {
        "operation": kind,
        "tasks": sorted(tasks),
        "options": {name: value for name, value in options.items() if value is not None},
        "peft_many": __version__,
    }
    return {**line, "forgotten": forgotten} if forgotten else line


def operations_of(adapters: Sequence[Adapter], without: Sequence[str], options: Mapping[str, Any]) -> list[dict]:
    """The record of a merge that is made of these adapters: theirs, and what is done now.

    Args:
        adapters (`Sequence[Adapter]`): As they were read, those of `without` included.
        without (`Sequence[str]`): The tasks that are left out, whose names leave the record too.
        options (`Mapping[str, Any]`): Of the merge.
    """
    record = []
    left_out = [task for adapter in adapters for task in adapter.tasks if task.name in without]
    gone = {*without, *(inner["name"] for task in left_out for inner in task.provenance.get("pooled") or ())}
    for adapter in sorted(adapters, key=lambda adapter: min(task.name for task in adapter.tasks)):
        named = [task["name"] for task in getattr(adapter.config, "tasks", None) or []]
        names = dict(zip(named, [task.name for task in adapter.tasks]))
        for line in getattr(adapter.config, "operations", None) or []:
            if line["operation"] != REFIT:  # which merging anew undoes
                record.append(_with_names(line, names, gone))
    merges = [adapter for adapter in adapters if isinstance(adapter.config, MAnyConfig) and adapter.config.is_merge]
    merged = [task.name for adapter in merges for task in adapter.tasks]
    added = [task.name for adapter in adapters if adapter not in merges for task in adapter.tasks]
    if len(merges) != 1:
        kind, tasks = MERGE, [*merged, *added]
    elif added:
        kind, tasks = ADD, added
    elif without:
        kind, tasks = REMOVE, []
    else:
        kind, tasks = CHANGE, merged
    kept = [task for task in tasks if task not in without]
    return [*record, operation(kind, kept, options, forgotten=len({*without} & {*merged}))]


def _with_names(line: Mapping[str, Any], names: Mapping[str, str], gone: Collection[str]) -> dict[str, Any]:
    """A line of an earlier record with the tasks' names of now, and without those of tasks that are forgotten."""
    tasks = [names.get(task, task) for task in line["tasks"]]
    kept = [task for task in tasks if task not in gone]
    forgotten = line.get("forgotten", 0) + len(tasks) - len(kept)
    return {**line, "tasks": kept, **({"forgotten": forgotten} if forgotten else {})}
