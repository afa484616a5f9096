"""The config of a merge, made of the configs of its adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mode
from typing import Any

from ..files.adapter import Adapter
from ..files.patterns import exceptions_by_pattern
from ..records import MergeRecord
from ..tuner.config import MAnyConfig, Statistics
from .prepare import PreparedMerge
from .same_base import base_of


def merged_config(
    prepared: PreparedMerge, record: MergeRecord | None = None, statistics: Statistics | None = None
) -> MAnyConfig:
    """The config of a merge, or without its record that of a pool, which is an adapter of one task."""
    configs = [adapter.config for adapter in prepared.adapters]
    ranks = {layer: prepared.rank_of(layer) for layer in prepared.layers}
    rank = mode(ranks.values())
    projectors = sorted({*prepared.routing, *prepared.averaged})
    base_model, revision = base_of(prepared.adapters)
    exceptions = exceptions_by_pattern(ranks, rank)
    merged = MAnyConfig(
        r=rank,
        lora_alpha=rank,  # the scaling is folded into the weights
        rank_pattern=exceptions,
        alpha_pattern=dict(exceptions),
        target_modules=_common(configs, "target_modules") if _same_layers(prepared.adapters) else sorted(ranks),
        modules_to_save=projectors or None,
        projector_modules=list(projectors),
        fan_in_fan_out=any(getattr(config, "fan_in_fan_out", False) for config in configs),
        task_type=None if projectors or _take_images(prepared.adapters) else _task_type(configs),
        auto_mapping=_common(configs, "auto_mapping"),
        base_model_name_or_path=base_model,
        revision=revision,
        inference_mode=True,
        merge=record,
        statistics=statistics,
    )
    if isinstance(merged.target_modules, set):
        # A set of strings is saved in another order by every process; the same merge should be the same file.
        merged.target_modules = sorted(merged.target_modules)
    return merged


def _common(configs: Iterable[Any], field: str) -> Any:
    """The value that all configs which have one agree on, else `None`."""
    values = [value for config in configs if (value := getattr(config, field, None))]
    return values[0] if values and all(value == values[0] for value in values) else None


def _take_images(adapters: Iterable[Adapter]) -> bool:
    """Whether images passed while they were measured: then "CAUSAL_LM" is said of a language model inside."""
    return any(task.statistics.images for adapter in adapters for task in adapter.tasks)


def _task_type(configs: Sequence[Any]) -> Any:
    """What all say alike; one that says none needs no class of PEFT's for its kind of task, so the merge does not."""
    kinds = {getattr(config, "task_type", None) for config in configs}
    return kinds.pop() if len(kinds) == 1 else None


def _same_layers(adapters: Sequence[Adapter]) -> bool:
    """Whether all adapters say in the same words which layers they adapt, so that the merge may say it so too."""
    configs = [adapter.config for adapter in adapters]
    if _common(configs, "target_modules") is None:
        return False
    fewer = ("layers_to_transform", "exclude_modules")
    if any(getattr(config, name, None) not in (None, [], set(), "") for config in configs for name in fewer):
        return False  # there the words say less than half of it
    return len({frozenset(task.deltas) for adapter in adapters for task in adapter.tasks}) == 1
