"""A merge is a living thing: tasks are added to it and forgotten again, with the options that it was made with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Unpack

from ..files.adapter import read_adapter
from ..files.errors import UnmergeableAdapterError
from ..hub.sources import HubArguments, check_entry, find_adapter
from ..merging.merge import merge_adapter_files
from ..merging.prepare import AdapterPath, TaskNames
from ..methods.base import ForeignMethod
from ..records import MergeOptions


def add_task(
    merge: AdapterPath,
    adapter: AdapterPath,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    task_name: TaskNames = None,
    same_base: bool = False,
    weights: Mapping[str, float] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    **hub: Unpack[HubArguments],
) -> Path:
    """Add a task to a merge, without the adapters that it was made of and without a base model.

    The result is what merging all adapters at once with the merge's options would have given; a refit of the merge
    ([`refit_merge`]) is not kept. All tasks are merged anew, in the time and memory that [`merge_adapter_files`] takes
    for that many.

    Args:
        merge (`str`): The folder or Hub id of a merge.
        adapter (`str`): The folder or Hub id of the new task's adapter; another merge brings several tasks.
        output_dir (`str`, *optional*): The folder to create. Without it the merge's own folder is replaced, whole.
        task_name (`str`, *optional*): Name of the new task, where the adapter does not say or clashes.
        same_base (`bool`, defaults to `False`): As in [`merge_adapter_files`], like `device`.
        weights (`Mapping[str, float]`, *optional*): Weights by task name; the others keep theirs, a new task 1.
        device (`str` or `torch.device`, defaults to `"cpu"`): As in [`merge_adapter_files`].
        progress (`bool`, defaults to `True`): Show progress bars.
        **hub: `token`, `cache_dir` and `local_files_only`, as in [`~huggingface_hub.snapshot_download`].

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: `weights` is no mapping, or the merge is no local folder and there is no `output_dir`.
        UnmergeableAdapterError, AdapterNotFoundError, StatisticsError, FileExistsError: As in [`merge_adapter_files`].

    Example:

        ```py
        >>> from peft_many import add_task

        >>> add_task("merged", "vizwiz", "merged-3")
        PosixPath('merged-3')
        ```
    """
    return _merged_anew(
        merge,
        output_dir,
        hub,
        further=[adapter],
        task_names=None if task_name is None else [None, task_name],
        same_base=same_base,
        weights=weights,
        device=device,
        progress=progress,
    )


def remove_task(
    merge: AdapterPath,
    task_name: str,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    **hub: Unpack[HubArguments],
) -> Path:
    """Forget a task of a merge, exactly: its deltas, covariances, prototype and projector are gone.

    The result is what merging the other tasks' adapters with the merge's options would have given, and no tensor of
    the task is left in the files. Copies of the merge elsewhere, in a Hub repository's history say, are not touched.
    A refitted merge ([`refit_merge`]) is merged anew, without its refit, which the task had a part in. All other tasks
    are merged anew, as in [`add_task`].

    Arguments that are not listed are as in [`add_task`].

    Args:
        task_name (`str`): The task to forget.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: The merge has no task of that name, or no other; or as in [`add_task`].
        UnmergeableAdapterError: The task has a part in the mean of several projectors, which cannot be undone.
        AdapterNotFoundError, StatisticsError, FileExistsError: As in [`merge_adapter_files`].

    Example:

        ```py
        >>> from peft_many import remove_task

        >>> remove_task("merged", "clevr", "merged-without-clevr")
        PosixPath('merged-without-clevr')
        ```
    """
    if not isinstance(task_name, str):
        raise ValueError(f"`task_name` must be the name of one task, but it is {task_name!r}.")
    return _merged_anew(merge, output_dir, hub, without=[task_name], weights=weights, device=device, progress=progress)


def reweight_tasks(
    merge: AdapterPath,
    weights: Mapping[str, float],
    output_dir: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
    **hub: Unpack[HubArguments],
) -> Path:
    """Give tasks of a merge other weights, without the adapters that it was made of and without a base model.

    The result is what merging the tasks' adapters with these weights would have given; a refit of the merge
    ([`refit_merge`]) is not kept. All tasks are merged anew, as in [`add_task`].

    Arguments that are not listed are as in [`add_task`].

    Args:
        weights (`Mapping[str, float]`): Weights by task name; the others keep theirs.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: The merge has no task of that name; or as in [`add_task`].
        UnmergeableAdapterError: A projector is the mean of several tasks' and cannot be weighted anew.
        AdapterNotFoundError, StatisticsError, FileExistsError: As in [`merge_adapter_files`].

    Example:

        ```py
        >>> from peft_many import reweight_tasks

        >>> reweight_tasks("merged", {"clevr": 2.0}, "merged-2")
        PosixPath('merged-2')
        ```
    """
    return _merged_anew(merge, output_dir, hub, weights=weights, device=device, progress=progress)


def merge_options(merge: AdapterPath, **hub: Unpack[HubArguments]) -> MergeOptions:
    """The options that a merge was made with, if it is one and by a method of ours."""
    source = find_adapter(merge, **hub)
    record = read_adapter(source).merge
    if record is None:
        raise UnmergeableAdapterError(
            f"{source.name} is the adapter of one task and no merge. Give a merge first, then what is to be added or "
            "removed; or make a merge of this and others (`peft-many merge`, `merge_adapter_files`)."
        )
    if isinstance(record.options.method, ForeignMethod):
        raise UnmergeableAdapterError(
            f"{source.name} was merged by the method '{record.options.method.name}', which is not one of peft_many's; "
            "use `merge_adapter_files` with `method=` (and `without=`)."
        )
    return record.options


def place_for(merge: AdapterPath, output_dir: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    """Where a merge that is changed goes: to a folder that is given, or in its own place."""
    if output_dir is None and not Path(merge).expanduser().is_dir():
        raise ValueError(
            f"'{merge}' is not a local folder, so it cannot be replaced; give a folder for the new merge (`--output`)."
        )
    return merge if output_dir is None else output_dir


def _merged_anew(
    merge: AdapterPath,
    output_dir: str | os.PathLike[str] | None,
    hub: HubArguments,
    further: Sequence[AdapterPath] = (),
    **change: Any,
) -> Path:
    """Merge again with the options that a merge was made with, in its place or in a new folder."""
    check_entry(merge)
    if not isinstance(change["weights"], (Mapping, type(None))):
        raise ValueError(f"`weights` must map tasks' names to weights, but it is {change['weights']!r}.")
    return merge_adapter_files(
        [merge, *further],
        output_dir=place_for(merge, output_dir),
        overwrite=output_dir is None,
        **vars(merge_options(merge, **hub)),
        **change,
        **hub,
    )
