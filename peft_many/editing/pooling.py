"""Pooling tasks: many adapters become one of constant size, for merging without end in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from ..algebra.covariance import LowRankCovariance
from ..algebra.precision import without_autocast
from ..algebra.spectrum import Truncation
from ..algebra.sums import added_covariances
from ..files.adapter import TaskAdapter
from ..files.atomic import new_folder, writable_place
from ..files.fingerprints import weight_fingerprint
from ..files.projectors import shapes_of, tensors_inside
from ..files.source import write_adapter
from ..files.statistics import AdapterStatistics, InputStatistics, TaskStatistics
from ..files.stored_features import FeatureStatistics, Prompts
from ..files.tensor_keys import KEY_PREFIX
from ..hub.sources import HubArguments
from ..merging.arguments import output_folder, several, usable_device
from ..merging.group import merged_deltas, tensors_of
from ..merging.merged_config import merged_config
from ..merging.operations import POOL, operation
from ..merging.prepare import AdapterPath, PreparedMerge, TaskNames, prepare_merge
from ..merging.reading import read_group
from ..merging.selection import TaskWeights
from ..records import MergeOptions, PooledTask, PoolRecord
from ..records.options import MEAN
from ..records.words import counted
from ..tuner.config import MAnyConfig
from .pool_sizes import DEFAULT_POOL_RANK, DEFAULT_STATISTICS_RANK

_MOST_PROMPTS = 64  # that a pool keeps of its tasks'


@without_autocast()
def pool_adapters(
    adapters: Sequence[AdapterPath],
    output_dir: str | os.PathLike[str],
    *,
    task_name: str | None = None,
    weights: TaskWeights = None,
    task_names: Sequence[TaskNames] | None = None,
    same_base: bool = False,
    rank: int = DEFAULT_POOL_RANK,
    statistics_rank: int = DEFAULT_STATISTICS_RANK,
    ridge: float | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    **hub: Unpack[HubArguments],
) -> Path:
    """Make one task adapter of several, whose size does not depend on how many: a merge that cannot be taken apart.

    A merge keeps every task's statistics, projector and prototype, and grows with them. A pool keeps one of each: the
    merged delta, cut to `rank` by reduced-rank regression; the mean of the covariances, cut to `statistics_rank`
    directions with the rest spread evenly; the mean of the projectors; and the mean and spread of all images. It is an
    ordinary adapter, to be merged with others or pooled again as new tasks come, with the sum of the tasks' weights.

    Merging from a pool gives what merging its tasks would have given, but for what was cut (docs/benchmarks.md). What
    is lost: its tasks share one projector, so that images are no longer routed among them, and none of them can be
    forgotten. Pool tasks that look alike, and leave the others apart.

    While it is made, the whole pool is in memory, and of the adapters' LoRAs and covariances those of one group of
    layers with the same input.

    Merges and pools may be among the adapters. Arguments that are not listed are as in [`merge_adapter_files`].

    Args:
        output_dir (`str`): The folder to create; it must not exist, or be empty.
        task_name (`str`, *optional*):
            What to call the pool. Defaults to its tasks' names, joined by `+`; of more than three to their number.
        rank (`int`, defaults to 128): The largest rank of a pooled delta.
        statistics_rank (`int`, defaults to 256):
            The most directions of a pooled covariance, and of the images' spread.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: `statistics_rank` is below 1, or an option is impossible, as in [`merge_adapter_files`].
        FileExistsError: The output folder exists and is not empty.
        UnmergeableAdapterError, AdapterNotFoundError, StatisticsError: As in [`merge_adapter_sequence`].

    Example:

        ```py
        >>> from peft_many import pool_adapters

        >>> pool_adapters(["iconqa", "clevr"], "pool", rank=8)
        PosixPath('pool')
        ```
    """
    adapters = several(adapters)
    output = output_folder(output_dir, adapters)
    writable_place(output)  # now, and not when all is computed
    if statistics_rank < 1:
        raise ValueError(f"`statistics_rank` must be at least 1, but it is {statistics_rank}.")
    computing = usable_device(device)
    prepared = prepare_merge(
        adapters,
        MergeOptions(projectors=MEAN, ridge=ridge, rank=rank),
        weights=weights,
        task_names=task_names,
        hub=hub,
        progress=progress,
        same_base=same_base,
    )
    names = [task.name for task in prepared.tasks]
    name = task_name or ("+".join(names) if len(names) <= 3 else f"{len(names)} tasks")
    tensors = {f"{KEY_PREFIX}{key}": tensor for key, tensor in prepared.whole_tensors.items()}
    truncation = Truncation(rank=statistics_rank, energy=1.0)
    inputs: dict[str, InputStatistics] = {}
    input_of: dict[str, str] = {}
    fingerprints: dict[str, list[float]] = {}
    for group in tqdm(prepared.groups, f"Pooling {counted(len(names), 'task')}", unit="input", disable=not progress):
        merged = merged_deltas(prepared, read_group(prepared, group, computing))
        prepared.release()
        tensors |= tensors_of(merged)
        fingerprints |= {module: weight_fingerprint(delta.A, delta.B) for module, delta in merged.items()}
        if (pooled := _pooled_input(prepared.tasks, group[0], truncation)) is not None:
            inputs[group[0]] = pooled
            input_of |= dict.fromkeys(group, group[0])
    statistics = replace(
        _without_layers(prepared, name, truncation), inputs=inputs, input_of=input_of, fingerprints=fingerprints
    )
    return _save(output, tensors, _config_of(prepared, name, statistics))


def _save(output: Path, tensors: Mapping[str, Tensor], config: MAnyConfig) -> Path:
    with new_folder(output) as folder:
        write_adapter(folder, config, tensors)
    return output


def _config_of(prepared: PreparedMerge, name: str, statistics: TaskStatistics) -> MAnyConfig:
    """The config of a task adapter."""
    tasks = prepared.tasks
    pooled = [
        inner
        for task in tasks
        for inner in task.origin.pooled
        or [PooledTask(task.name, task.weight, task.origin.sha256, task.origin.source, task.origin.revision)]
    ]
    done = operation(POOL, [task.name for task in tasks], prepared.options.describe())
    config = merged_config(prepared, statistics=AdapterStatistics((statistics,)))
    return replace(config, task_name=name, pool=PoolRecord(pooled, [*prepared.operations[:-1], done]))


def _without_layers(prepared: PreparedMerge, name: str, truncation: Truncation) -> TaskStatistics:
    """What a pool's statistics say of everything but its layers."""
    measured = [task.statistics for task in prepared.tasks]
    return TaskStatistics(
        name=name,
        samples=sum(one.samples for one in measured),
        weighed=any(one.weighed for one in measured),
        projectors=_pooled_images(measured, truncation),
        instructions=_pooled_features([one.instructions for one in measured], truncation),
        prompts=_pooled_prompts([one.prompts for one in measured], truncation),
        projector_shapes={
            projector: shapes_of(tensors_inside(prepared.routed_tensors, f"{projector}."))
            for projector in prepared.averaged
        },
        weight=sum(task.weight for task in prepared.tasks),
    )


def _pooled_input(tasks: Sequence[TaskAdapter], module: str, truncation: Truncation) -> InputStatistics | None:
    """`Σ_t w_t C_t / Σ_t w_t` with the sum of all weights below, so that the pool's weight times it is their `R`."""
    whole = sum(task.weight for task in tasks)
    measured = [(task.weight / whole, task.statistics) for task in tasks]
    known = [(share, c) for share, of in measured if (c := of.covariance_of(module)) is not None]
    if not known:
        return None
    tokens = sum(task.statistics.tokens_of(module) for task in tasks)
    return InputStatistics(truncation.apply(added_covariances(known)), tokens)


def _pooled_images(measured: Sequence[TaskStatistics], truncation: Truncation) -> dict[str, FeatureStatistics]:
    """All images together, by projector."""
    seen: dict[str, list[FeatureStatistics | None]] = {}
    for task in measured:
        for projector, one in task.projectors.items():
            seen.setdefault(projector, []).append(one)
    pooled = {projector: _pooled_features(ones, truncation) for projector, ones in seen.items()}
    return {projector: one for projector, one in pooled.items() if one is not None}


def _pooled_features(seen: Sequence[FeatureStatistics | None], truncation: Truncation) -> FeatureStatistics | None:
    """Those of all tasks together, if all have some; a spread only where all have one."""
    known = [one for one in seen if one is not None]
    if not known or len(known) < len(seen):
        return None
    count = sum(one.count for one in known)
    means = torch.stack([one.prototype.double() for one in known])
    shares = torch.tensor([one.count / count for one in known], dtype=torch.float64)
    spread, spreads = None, [one.spread for one in known if one.spread is not None]
    if len(spreads) == len(known):
        within = added_covariances(list(zip(shares.tolist(), spreads)))
        between = LowRankCovariance(remainder=0.0, factor=shares.sqrt()[:, None] * (means - shares @ means))
        spread = truncation.apply(added_covariances([(1.0, within), (1.0, between)]))
    return FeatureStatistics((shares @ means).float(), spread, count)


def _pooled_prompts(asked: Sequence[Prompts | None], truncation: Truncation) -> Prompts | None:
    """Those of all tasks, one of each in turn, as far as a pool has room; if all have some."""
    known = [one for one in asked if one is not None]
    if not known or len(known) < len(asked):
        return None
    rows = ([row[row >= 0] for row in one.ids] for one in known)
    tokens = _pooled_features([one.image_tokens for one in known if one.image_tokens is not None], truncation)
    return Prompts.in_turn(rows, _MOST_PROMPTS, max(one.answer_tokens for one in known), tokens)
