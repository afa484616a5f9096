"""A merge is a living thing: tasks are added to it and forgotten again, with the options that it was made with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..files.adapter import read_adapter
from ..files.stored_delta import UnmergeableAdapterError
from ..hub.sources import find_adapter
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
    weights: Mapping[str, float] | None = None,
    device: str | torch.device = "cpu",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> Path:
    """Add a task to a merge, without the adapters that it was made of and without a base model.

    The result is what merging all adapters at once with the merge's options would have given; a refit of the merge
    ([`refit_merge`]) is not kept.

    Args:
        merge (`str`): The folder or Hub id of a merge.
        adapter (`str`): The folder or Hub id of the new task's adapter; another merge brings several tasks.
        output_dir (`str`, *optional*): The folder to create. Without it the merge's own folder is replaced, whole.
        task_name (`str`, *optional*): Name of the new task, where the adapter does not say or clashes.
        weights (`Mapping[str, float]`, *optional*): Weights by task name; the others keep theirs, a new task 1.
        device (`str` or `torch.device`, defaults to `"cpu"`): As in [`merge_adapter_files`].
        token (`str` or `bool`, *optional*): As in [`~huggingface_hub.snapshot_download`], like the next two.
        cache_dir (`str`, *optional*): Where Hub downloads are kept.
        local_files_only (`bool`, defaults to `False`): Use only what is in the cache.
        progress (`bool`, defaults to `True`): Show progress bars.

    Returns:
        `Path`: The folder.

    Raises:
        UnmergeableAdapterError, AdapterNotFoundError, StatisticsError, FileExistsError: As in [`merge_adapter_files`].
    """
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    change = {"adapters": [merge, adapter], "task_names": None if task_name is None else [None, task_name]}
    return _merged_anew(merge, output_dir, change, hub, weights=weights, device=device, progress=progress)


def remove_task(
    merge: AdapterPath,
    task_name: str,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    device: str | torch.device = "cpu",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> Path:
    """Forget a task of a merge, exactly: its deltas, covariances, prototype and projector are gone.

    The result is what merging the other tasks' adapters with the merge's options would have given, and no tensor of
    the task is left in the files. Copies of the merge elsewhere, in a Hub repository's history say, are not touched.
    A refitted merge ([`refit_merge`]) is merged anew, without its refit, which the task had a part in.

    Args:
        merge (`str`): The folder or Hub id of a merge.
        task_name (`str`): The task to forget.
        output_dir (`str`, *optional*): The folder to create. Without it the merge's own folder is replaced, whole.
        weights (`Mapping[str, float]`, *optional*): New weights of the other tasks, by name.
        device (`str` or `torch.device`, defaults to `"cpu"`): As in [`merge_adapter_files`].
        token (`str` or `bool`, *optional*): As in [`~huggingface_hub.snapshot_download`], like the next two.
        cache_dir (`str`, *optional*): Where Hub downloads are kept.
        local_files_only (`bool`, defaults to `False`): Use only what is in the cache.
        progress (`bool`, defaults to `True`): Show progress bars.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: The merge has no task of that name, or no other.
        UnmergeableAdapterError: The task has a part in the mean of several projectors, which cannot be undone.
        AdapterNotFoundError, StatisticsError, FileExistsError: As in [`merge_adapter_files`].
    """
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    change = {"adapters": [merge], "without": [task_name]}
    return _merged_anew(merge, output_dir, change, hub, weights=weights, device=device, progress=progress)


def merge_options(merge: AdapterPath, **hub: Any) -> MergeOptions:
    """The options that a merge was made with.

    Args:
        merge (`str`): The folder or Hub id of a merge.
        **hub (`Any`): `token`, `cache_dir` and `local_files_only`.

    Raises:
        UnmergeableAdapterError: It is no merge, or was made by a method that is not one of ours.
    """
    source = find_adapter(merge, **hub)
    record = read_adapter(source).merge
    if record is None:
        raise UnmergeableAdapterError(
            f"{source.name} is the adapter of one task and no merge; merge it with others (`merge_adapter_files`)."
        )
    if isinstance(record.options.method, ForeignMethod):
        raise UnmergeableAdapterError(
            f"{source.name} was merged by the method '{record.options.method.name}', which is not one of peft_many's; "
            "use `merge_adapter_files` with `method=` (and `without=`)."
        )
    return record.options


def _merged_anew(
    merge: AdapterPath,
    output_dir: str | os.PathLike[str] | None,
    change: Mapping[str, Any],
    hub: Mapping[str, Any],
    **options: Any,
) -> Path:
    """Merge again with the options that a merge was made with, in its place or in a new folder."""
    return merge_adapter_files(
        **change,
        output_dir=_place(merge, output_dir),
        overwrite=output_dir is None,
        **vars(merge_options(merge, **hub)),
        **options,
        **hub,
    )


def _place(merge: AdapterPath, output_dir: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    if output_dir is None and not Path(merge).expanduser().is_dir():
        raise ValueError(f"'{merge}' is no local folder that could be replaced; say where the new merge should go.")
    return merge if output_dir is None else output_dir
