"""Arguments of merging and of what builds on it, checked before anything is read."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..algebra.devices import answers, float64_device
from ..files.atomic import check_apart
from ..files.errors import UnmergeableAdapterError
from ..files.source import AdapterSource, read_config
from ..hub.sources import check_entry, replaceable_files
from ..records import MergeRecord, merge_of


def check_arguments(entries: Any, weights: Any, without: Any, task_names: Any) -> None:
    """Check what a list of adapters, and what is said of each or of its tasks, looks like."""
    if not _is_list(entries) or len(entries) == 0:
        raise ValueError(f"`adapters` must be a list of at least one folder or Hub id, but it is {_shown(entries)}.")
    for entry in entries:
        check_entry(entry)
    by_task = isinstance(weights, Mapping)
    for name, given in (("weights", None if by_task else weights), ("task_names", task_names)):
        if given is None:
            continue
        if not _is_list(given):
            or_by_task = ", or a mapping of tasks' names to weights" if name == "weights" else ""
            raise ValueError(
                f"`{name}` must be a list with one entry for each adapter{or_by_task}, but it is {_shown(given)}."
            )
        if len(given) != len(entries):
            raise ValueError(f"`{name}` has {len(given)} entries for {len(entries)} adapters.")
        if _has_no_order(entries) or _has_no_order(given):
            raise ValueError(
                f"`{name}` goes with the adapters by their order, but a set has no order: give two lists."
            )
    for given in () if task_names is None else task_names:
        if given is None or isinstance(given, str):
            continue
        if not are_names(given) or _has_no_order(given):
            raise ValueError(f"`task_names` holds names, and for a merge a list of them, but one is {_shown(given)}.")
    if not are_names(without):
        raise ValueError(f"`without` must be a list of tasks' names, but it is {_shown(without)}.")
    numbers = list(weights.values() if by_task else () if weights is None else weights)
    if not all(_is_weight(weight) for weight in numbers):
        raise ValueError(f"`weights` must be finite and not negative, but they are {_shown(numbers)}.")


def several(adapters: Any) -> Any:
    """What an iterator gives as a list, to be gone through more than once; all else as it is."""
    return list(adapters) if isinstance(adapters, Iterator) else adapters


def output_folder(output_dir: Any, inputs: Any = ()) -> Path:
    """The folder that is to be written; not one of what it is made of."""
    if not isinstance(output_dir, (str, os.PathLike)) or not os.fspath(output_dir):
        raise ValueError(f"The output folder must be a path, but it is {_shown(output_dir)}; adapters come before it.")
    output = Path(output_dir).expanduser()
    check_apart(output, inputs if _is_list(inputs) else ())
    return output


def replaced_by_merge(output: Path, overwrite: bool, adapters: Any) -> list[str]:
    """The files that a merge of these adapters may replace in its output folder.

    A `FileExistsError` if it may not be written there: a task's adapter would be lost to a merge that takes its place.
    """
    check_apart(
        output, adapters if _is_list(adapters) else (), may_replace=lambda folder: merge_in(folder) is not None
    )
    return replaceable_files(output, overwrite)


def merge_in(folder: Path) -> MergeRecord | None:
    """What a folder's config says of how its merge was made; `None` of one that is no merge's, or cannot be read."""
    try:
        return merge_of(read_config(AdapterSource(folder, str(folder))))
    except UnmergeableAdapterError:  # which will be said when it is read
        return None


def usable_device(device: str | torch.device) -> torch.device:
    """Where to compute: the device, tried out before anything is read, or the CPU in place of one without float64."""
    if not isinstance(device, (str, int, torch.device)):
        raise ValueError(f"`device` must be a device or its name, but it is {_shown(device)}.")
    return answers(float64_device(answers(device, torch.float32)), torch.float64)


def _is_list(given: Any) -> bool:
    return isinstance(given, Collection) and not isinstance(given, (str, bytes, Mapping))


def _has_no_order(given: Any) -> bool:
    return isinstance(given, (set, frozenset))


def are_names(given: Any) -> bool:
    """Whether something is a list of names."""
    return _is_list(given) and all(isinstance(name, str) for name in given)


def _is_weight(value: Any) -> bool:
    try:
        return not isinstance(value, str) and 0 <= float(value) < math.inf
    except (TypeError, ValueError):
        return False


def _shown(value: Any) -> str:
    """A value in a message, or only its kind."""
    is_plain = isinstance(value, (str, int, float, list, tuple, dict, set, type(None)))
    return reprlib.repr(value) if is_plain else f"a {type(value).__name__}"
