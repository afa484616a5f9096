"""What a merge will be: everything is read and checked but the weights themselves, and nothing is computed yet."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .algebra.scatter import cost
from .plugin.adapter import Adapter, TaskAdapter, read_adapter
from .plugin.config import DEFAULT_TEMPERATURE, MAnyConfig
from .plugin.hub import find_adapter
from .plugin.statistics import AdapterStatistics
from .plugin.stored_delta import KEY_PREFIX, TASK_WEIGHT, UnmergeableAdapterError
from .plugin.tensor_file import TensorFile
from .version import __version__

DEFAULT_RIDGE = 1e-4
AdapterPath = str | os.PathLike[str]
TaskNames = str | Sequence[str] | None


@dataclass(frozen=True)
class MergePlan:
    """A merge that can be carried out: tasks that fit together, options, and what comes out.

    Args:
        adapters (`Sequence[Adapter]`): As they were given.
        tasks (`Sequence[TaskAdapter]`): Of all adapters, sorted by name.
        groups (`Sequence[Sequence[str]]`): The layers that share their input in every task; one problem to solve each.
        routing (`dict[str, dict]`): For the config: by projector, the routed tasks and the width of the prototypes.
        projector_tensors (`dict[str, torch.Tensor]`): Experts and prototypes; on disk until they are used.
        options (`dict[str, Any]`): `ridge`, `temperature`, `top_k`, `rank`, `gate_lora` and `dtype`.
    """

    adapters: Sequence[Adapter]
    tasks: Sequence[TaskAdapter]
    groups: Sequence[Sequence[str]]
    routing: dict[str, dict[str, Any]]
    projector_tensors: dict[str, Tensor]
    options: dict[str, Any]

    @property
    def files(self) -> list[TensorFile]:
        """The files that weights and statistics are mapped from."""
        return [file for adapter in self.adapters for file in adapter.files]

    def rank_of(self, module: str) -> int:
        """The rank of a layer's merged delta: `Σ r_t`, or what `rank` allows."""
        stacked = sum(self.ranks_of(module))
        return stacked if self.options["rank"] is None else min(stacked, self.options["rank"])

    def ranks_of(self, module: str) -> list[int]:
        """`r_t` of each task in a layer, zero where a task did not train it."""
        return [task.deltas[module].rank if module in task.deltas else 0 for task in self.tasks]

    def shape_of(self, module: str) -> tuple[int, int]:
        """`(out, in)` of a layer."""
        return next(task.deltas[module].shape for task in self.tasks if module in task.deltas)

    def cost_of(self, group: Sequence[str]) -> float:
        """Multiplications that merging a group takes, for sharing groups out."""
        covariances = [task.statistics.covariances.get(group[0]) for task in self.tasks]
        rank = sum(covariance.rank for covariance in covariances if covariance is not None)
        rows = sum(task.deltas[module].rank for task in self.tasks for module in group if module in task.deltas)
        return cost(self.shape_of(group[0])[1], rank, rows)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of everything in the merge's weights file."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for module in (module for group in self.groups for module in group):
            out, width = self.shape_of(module)
            found[f"{KEY_PREFIX}{module}.lora_A.weight"] = (self.options["dtype"], (self.rank_of(module), width))
            found[f"{KEY_PREFIX}{module}.lora_B.weight"] = (self.options["dtype"], (out, self.rank_of(module)))
            if self.options["gate_lora"]:
                found[f"{KEY_PREFIX}{module}.{TASK_WEIGHT}"] = found[f"{KEY_PREFIX}{module}.lora_A.weight"]
        for name, tensor in self.projector_tensors.items():
            found[f"{KEY_PREFIX}{name}"] = (tensor.dtype, tuple(tensor.shape))
        return found

    def key(self) -> str:
        """A name for this very merge: the same inputs, options and version of the code give the same."""
        files = [(str(file.path), *_identity(file.path)) for file in self.files]
        tasks = [(task.name, task.weight, task.provenance["sha256"]) for task in self.tasks]
        text = json.dumps([__version__, torch.__version__, files, tasks, self.options], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def config(self, statistics: AdapterStatistics | None) -> MAnyConfig:
        """The config of the merge."""
        configs = [adapter.config for adapter in self.adapters]
        ranks = {module: self.rank_of(module) for group in self.groups for module in group}
        rank = max(ranks.values(), key=list(ranks.values()).count)
        exceptions = {name.replace(".", r"\."): r for name, r in ranks.items() if r != rank}
        blocks = {module: self.ranks_of(module) for module in ranks} if self.options["gate_lora"] else {}
        usual = max(blocks.values(), key=list(blocks.values()).count) if blocks else None
        merged = MAnyConfig(
            r=rank,
            lora_alpha=rank,  # the scaling is folded into the weights
            rank_pattern=exceptions,
            alpha_pattern=dict(exceptions),
            target_modules=_common(configs, "target_modules") if _same_layers(self.adapters) else sorted(ranks),
            modules_to_save=sorted(self.routing) or None,
            projector_modules=sorted(self.routing),
            fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
            task_type=_common(configs, "task_type"),
            auto_mapping=_common(configs, "auto_mapping"),
            base_model_name_or_path=_common(configs, "base_model_name_or_path"),
            revision=_common(configs, "revision"),
            inference_mode=True,
            energy=1.0,  # what the tasks' statistics kept is kept
            ridge=self.options["ridge"],
            temperature=self.options["temperature"],
            top_k=self.options["top_k"],
            gate_lora=self.options["gate_lora"],
            task_ranks=usual,
            task_rank_pattern={name.replace(".", r"\."): of for name, of in blocks.items() if of != usual},
            tasks=[{"name": task.name, "weight": task.weight, **task.provenance} for task in self.tasks],
            routing=self.routing or None,
            statistics=statistics,
        )
        if isinstance(merged.target_modules, set):
            # A set of strings is saved in another order by every process; the same merge should be the same file.
            merged.target_modules = sorted(merged.target_modules)
        return merged


def plan_merge(
    entries: Sequence[AdapterPath],
    *,
    weights: Sequence[float] | None = None,
    task_names: Sequence[TaskNames] | None = None,
    ridge: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    rank: int | None = None,
    gate_lora: bool | None = None,
    dtype: torch.dtype = torch.float32,
    hub: Mapping[str, Any],
    progress: bool,
) -> MergePlan:
    """Find and read the adapters and check that they can be merged; the arguments are those of merging.

    Raises:
        ValueError, UnmergeableAdapterError, AdapterNotFoundError, StatisticsError: As merging says.
    """
    if isinstance(entries, (str, os.PathLike)) or not entries:
        raise ValueError("Give a list of at least one adapter to merge.")
    for name, given in (("weights", weights), ("task_names", task_names)):
        if given is not None and len(given) != len(entries):
            raise ValueError(f"`{name}` has {len(given)} entries for {len(entries)} adapters.")
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be positive and finite, but it is {temperature}.")
    if ridge is not None and not 0 <= ridge < math.inf:
        raise ValueError(f"`ridge` must be finite and not negative, but it is {ridge}.")
    for name, number in (("rank", rank), ("top_k", top_k)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise ValueError(f"`{name}` must be a whole number, but it is {number}.")
        if number is not None and number < 1:
            raise ValueError(f"`{name}` must be at least 1, but it is {number}.")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"`dtype` must be torch.float32, torch.bfloat16 or torch.float16, but it is {dtype}.")
    if weights is not None and not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"`weights` must be finite and not negative, but they are {list(weights)}.")
    adapters = [
        read_adapter(find_adapter(entry, **hub), task_names[i] if task_names is not None else None)
        for i, entry in enumerate(tqdm(entries, desc="Reading adapters", unit="adapter", disable=not progress))
    ]
    factors = weights if weights is not None else [1.0] * len(adapters)
    tasks = [
        replace(task, weight=factor * task.weight)
        for adapter, factor in zip(adapters, factors)
        for task in adapter.tasks
    ]
    tasks.sort(key=lambda task: task.name)  # so that any order of the list gives the same merge to the bit
    _check_tasks(tasks)
    _check_same_base(adapters)
    merges = [
        adapter.config for adapter in adapters if isinstance(adapter.config, MAnyConfig) and adapter.config.tasks
    ]
    options = {
        "ridge": _first_known(ridge, _agreed(merges, "ridge"), DEFAULT_RIDGE),
        "temperature": _first_known(temperature, _agreed(merges, "temperature"), DEFAULT_TEMPERATURE),
        "top_k": _first_known(top_k, _agreed(merges, "top_k")),
        "rank": rank,
        "gate_lora": _first_known(gate_lora, _agreed(merges, "gate_lora"), False),
        "dtype": dtype,
    }
    groups = _shared_inputs(tasks)
    routing, projector_tensors = _projectors_of(tasks, options["gate_lora"])
    if options["gate_lora"]:
        _check_gate(routing, rank)
    return MergePlan(adapters, tasks, groups, routing, projector_tensors, options)


def _identity(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _check_tasks(tasks: Sequence[TaskAdapter]) -> None:
    """No task twice, be it by name or by content; weights that leave something to merge."""
    by_hash: dict[str, TaskAdapter] = {}
    by_name: dict[str, TaskAdapter] = {}
    for task in tasks:
        same = by_hash.setdefault(task.provenance["sha256"], task)
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


def _check_same_base(adapters: Sequence[Adapter]) -> None:
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


def _shared_inputs(tasks: Sequence[TaskAdapter]) -> list[list[str]]:
    """The layers that any task trained, grouped by the covariances that describe their input; shapes are checked."""
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
    groups: dict[tuple[int, ...], list[str]] = {}
    for module in sorted(shapes):
        inputs = tuple(id(task.statistics.covariances.get(module)) for task in tasks)
        groups.setdefault(inputs, []).append(module)
    return list(groups.values())


def _check_gate(routing: Mapping[str, Any], rank: int | None) -> None:
    """A gate needs every task's block of each layer, and prototypes."""
    if rank is not None:
        raise ValueError(
            "`gate_lora` keeps every task's block of each layer, so a `rank` cannot be given; pass `gate_lora=False` "
            "or leave `rank` out."
        )
    if not routing:
        raise UnmergeableAdapterError(
            "`gate_lora` goes by the tasks' visual prototypes, but none of the adapters has one: no image passed "
            "while their statistics were collected."
        )


def _projectors_of(
    tasks: Sequence[TaskAdapter], untrained_too: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """CPM: every task's projector and prototype side by side; tasks that saw no image take no part.

    Projectors that no task trained are routed only for what a gate learns from them.
    """
    routing: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    names = {name for task in tasks for name in task.projectors}
    if untrained_too:
        adapted = {module for task in tasks for module in task.deltas}
        seen = {name for task in tasks for name in task.statistics.prototypes}
        names |= {name for name in seen if not any(module.startswith(f"{name}.") for module in adapted)}
    for projector in sorted(names):
        routed = [task for task in tasks if projector in task.statistics.prototypes and task.weight > 0]
        if not routed:
            continue
        for task in tasks:
            inner = next((n for n in (*task.deltas, *task.projectors) if n.startswith(f"{projector}.")), None)
            if inner is not None:
                raise UnmergeableAdapterError(
                    f"{task.source} trained '{inner}', a part of the projector '{projector}' that other adapters "
                    "trained whole; these cannot be merged."
                )
        prototypes = [task.statistics.prototypes[projector].float() for task in routed]
        for task, prototype in zip(routed, prototypes):
            if prototype.shape != prototypes[0].shape:
                raise UnmergeableAdapterError(
                    f"The features at '{projector}' have width {len(prototypes[0])} in {routed[0].source}, but "
                    f"{len(prototype)} in {task.source}: they were trained on different base models."
                )
        routing[projector] = {
            "width": len(prototypes[0]),
            "tasks": [{"name": task.name, "trained": projector in task.projectors} for task in routed],
        }
        tensors[f"{projector}.prototypes"] = torch.stack(prototypes)
        _check_same_shapes(projector, [task for task in routed if projector in task.projectors])
        for t, task in enumerate(routed):
            for key, tensor in task.projectors.get(projector, {}).items():
                tensors[f"{projector}.experts.task_{t}.{key}"] = tensor
    return routing, tensors


def _check_same_shapes(projector: str, tasks: Sequence[TaskAdapter]) -> None:
    """All tasks that trained a projector must hold the same tensors of it."""
    for task in tasks[1:]:
        one, two = tasks[0].projectors[projector], task.projectors[projector]
        for key in sorted({*one, *two}):
            shapes = [tuple(tensors[key].shape) if key in tensors else "missing" for tensors in (one, two)]
            if shapes[0] != shapes[1]:
                raise UnmergeableAdapterError(
                    f"Tensor '{projector}.{key}' is {shapes[0]} in {tasks[0].source}, but {shapes[1]} in "
                    f"{task.source}: they were trained on different base models."
                )


def _agreed(merges: Sequence[MAnyConfig], option: str) -> Any:
    """What all merges say of an option, else `None`."""
    return _same([getattr(merge, option) for merge in merges])


def _first_known(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _common(configs: Iterable[Any], field: str) -> Any:
    """The value that all configs which have one agree on, else `None`."""
    return _same([value for config in configs if (value := getattr(config, field))])


def _same(values: Sequence[Any]) -> Any:
    return values[0] if values and all(value == values[0] for value in values) else None


def _same_layers(adapters: Sequence[Adapter]) -> bool:
    """Whether all adapters say in the same words which layers they adapt, so that the merge may say it so too."""
    configs = [adapter.config for adapter in adapters]
    if _common(configs, "target_modules") is None:
        return False
    if any(config.layers_to_transform is not None or config.exclude_modules for config in configs):
        return False  # there the words say less than half of it
    return len({frozenset(task.deltas) for adapter in adapters for task in adapter.tasks}) == 1
