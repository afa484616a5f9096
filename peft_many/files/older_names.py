"""Adapters whose layers had other names when they were trained: transformers 5 renamed the parts of many models."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn

from ..families.module_names import Names, names_before_v5, names_on
from .adapter import Adapter, TaskAdapter
from .errors import UnmergeableAdapterError
from .statistics import TaskStatistics
from .tensor_keys import KEY_PREFIX

Value = TypeVar("Value")

# Beside these, `language_model.model.` is an older name; alone it may be one of today (BLIP-2, InternVL's own code).
_OF_TRANSFORMERS = ("multi_modal_projector", "model.language_model.")
# These may be names of today, the first of text models; only beside adapters with the new ones are they known as old.
_OLD_BESIDE_NEW = (
    (re.compile(r"^model\.(?=layers\.|embed_tokens$)"), "model.language_model."),
    (re.compile(r"^visual\."), "model.visual."),
)


def with_current_names(adapters: Sequence[Adapter], base: nn.Module | None) -> list[Adapter]:
    """The adapters with the names of the base model, or, without one, with names that fit each other."""
    if base is not None:
        names_there = names_on(base)
        return [_renamed(adapter, names_there, type(base).__name__) for adapter in adapters]
    of_transformers = any(name.startswith(_OF_TRANSFORMERS) for name in _names(adapters))
    adapters = [_renamed(adapter, names_before_v5) if of_transformers else adapter for adapter in adapters]
    for old, new in _OLD_BESIDE_NEW:
        if any(name.startswith(new) for name in _names(adapters)):
            adapters = [_renamed(adapter, functools.partial(old.sub, new)) for adapter in adapters]
    return adapters


def _names(adapters: Sequence[Adapter]) -> list[str]:
    tasks = [task for adapter in adapters for task in adapter.tasks]
    return [name for task in tasks for name in (*task.deltas, *task.projectors, *task.statistics.projectors)]


def _renamed(adapter: Adapter, current: Names, model: str = "") -> Adapter:
    tasks = tuple(_renamed_task(task, current, model) for task in adapter.tasks)
    if all(task is old for task, old in zip(tasks, adapter.tasks)):
        return adapter
    config = copy.copy(adapter.config)
    config.target_modules = sorted({name for task in tasks for name in task.deltas})  # the config's words are old too
    return replace(adapter, config=config, tasks=tasks, pairs=_by_new_name(adapter.pairs, current))


def _renamed_task(task: TaskAdapter, current: Names, model: str) -> TaskAdapter:
    for name in (*task.deltas, *task.projectors):
        if current(name) is None:
            raise UnmergeableAdapterError(
                f"{task.source}: the adapter's key '{KEY_PREFIX}{name}' matches no module of {model}: it was trained "
                "on another base model."
            )
    vocabulary = {name.rpartition(".")[0] for name in task.base_tensors}
    known = (*task.deltas, *task.projectors, *vocabulary, *task.statistics.input_of, *task.statistics.projectors)
    if all(current(name) in (name, None) for name in known):
        return task
    return replace(
        task,
        deltas=_by_new_name(task.deltas, current),
        projectors=_by_new_name(task.projectors, current),
        base_tensors={
            f"{current(module) or module}.{part}": tensor
            for name, tensor in task.base_tensors.items()
            for module, _, part in [name.rpartition(".")]
        },
        statistics=_renamed_statistics(task.statistics, current),
    )


def _renamed_statistics(statistics: TaskStatistics, current: Names) -> TaskStatistics:
    input_of = _by_new_name(statistics.input_of, current)
    return replace(
        statistics,
        inputs=_by_new_name(statistics.inputs, current),
        input_of={name: current(key) or key for name, key in input_of.items()},
        fingerprints=_by_new_name(statistics.fingerprints, current),
        shapes=_by_new_name(statistics.shapes, current),
        lora_A=_by_new_name(statistics.lora_A, current),
        lora_B=_by_new_name(statistics.lora_B, current),
        projectors=_by_new_name(statistics.projectors, current),
        projector_shapes=_by_new_name(statistics.projector_shapes, current),
        unmoved_projectors=_by_new_name(statistics.unmoved_projectors, current),
    )


def _by_new_name(values: Mapping[str, Value], current: Names) -> dict[str, Value]:
    return {current(name) or name: value for name, value in values.items()}
