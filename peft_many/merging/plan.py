"""What a merge will be: everything is read and checked but the weights themselves, and nothing is computed yet."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..algebra.lpm import has_full_rank
from ..algebra.scatter import cost
from ..files.adapter import Adapter, TaskAdapter, read_adapter
from ..files.key_layouts import with_current_names
from ..files.statistics import AdapterStatistics
from ..files.stored_delta import KEY_PREFIX, TASK_WEIGHT
from ..files.tensor_file import TensorFile
from ..hub.sources import find_adapter
from ..methods import LPM, MergeMethod, as_method
from ..tuner.config import ROUTERS, MAnyConfig
from ..version import __version__
from .agreement import check_gate, check_same_base, check_tasks, check_whole_projectors, shared_inputs
from .mean_projectors import average_projectors
from .operations import operations_of
from .requirements import check_measured
from .routed_projectors import route_projectors
from .selection import TaskWeights, weighted_tasks, without_tasks

DEFAULT_RIDGE = 1e-4
DEFAULT_ROUTER = "cosine"
ROUTED, MEAN = "routed", "mean"
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
        averaged (`dict[str, list[str]]`): For the config: by averaged projector, the tasks that have a say in it.
        projector_tensors (`dict[str, torch.Tensor]`): Experts and prototypes, on disk until they are used; or means.
        method ([`MergeMethod`], *optional*): How deltas are merged; `None` is LPM.
        options (`dict[str, Any]`): `ridge`, `router` and its options, `rank`, `gate_lora` and `dtype`.
        operations (`list[dict]`): For the config: what was done to make the adapters, and this merge.
    """

    adapters: Sequence[Adapter]
    tasks: Sequence[TaskAdapter]
    groups: Sequence[Sequence[str]]
    routing: dict[str, dict[str, Any]]
    averaged: dict[str, list[str]]
    projector_tensors: dict[str, Tensor]
    method: MergeMethod | None
    options: dict[str, Any]
    operations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def files(self) -> list[TensorFile]:
        """The files that weights and statistics are mapped from."""
        return [file for adapter in self.adapters for file in adapter.files]

    def release(self) -> None:
        """Give back the memory of what was read of the files so far."""
        for file in self.files:
            file.release()

    def rank_of(self, module: str) -> int:
        """The rank of a layer's merged delta: what the tasks make up, and what `rank` allows."""
        ranks = [task.deltas[module].rank for task in self.tasks if module in task.deltas]
        whole = whole_rank(ranks, self.shape_of(module), self.method, self.options["gate_lora"])
        return whole if self.options["rank"] is None else min(whole, self.options["rank"])

    def ranks_of(self, module: str) -> list[int]:
        """`r_t` of each task in a layer, zero where a task did not train it."""
        return [task.deltas[module].rank if module in task.deltas else 0 for task in self.tasks]

    def shape_of(self, module: str) -> tuple[int, int]:
        """`(out, in)` of a layer."""
        return next(task.deltas[module].shape for task in self.tasks if module in task.deltas)

    def cost_of(self, group: Sequence[str]) -> float:
        """Multiplications that merging a group takes, for sharing groups out; by other methods, in proportion."""
        if self.method is not None:
            return float(sum(math.prod(self.shape_of(module)) for module in group))
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
        how = [_described(self.method), self.averaged, self.options]
        text = json.dumps([__version__, torch.__version__, files, tasks, how], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def described_options(self) -> dict[str, Any]:
        """The method and all options that it or the routing has, as JSON."""
        described = {"method": LPM if self.method is None else self.method.name}
        if self.method is not None:
            described |= self.method.describe()["options"]
        routed = ("router", "temperature", "top_k", "abstain_above")
        skipped = {*(() if self.routing else routed), *(() if self.method is None else ("ridge",))}
        described |= {name: value for name, value in self.options.items() if name not in skipped}
        return {**described, "dtype": str(self.options["dtype"]).removeprefix("torch.")}

    def described_tasks(self, interference: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
        """For the config: each task, where it comes from, what it was measured on, and what merging costs it."""
        described = []
        for task in self.tasks:
            about = {"name": task.name, "weight": task.weight, **task.provenance}
            about |= {"samples": task.statistics.samples, "images": task.statistics.images}
            if task.weight == 0 and task.projectors:
                about["projectors_left_out"] = sorted(task.projectors)
            if interference and task.name in interference:
                about["interference"] = interference[task.name]
            described.append(about)
        return described

    def config(
        self, statistics: AdapterStatistics | None, interference: Mapping[str, float] | None = None
    ) -> MAnyConfig:
        """The config of the merge; `interference` is for `described_tasks`."""
        configs = [adapter.config for adapter in self.adapters]
        ranks = {module: self.rank_of(module) for group in self.groups for module in group}
        rank = max(ranks.values(), key=list(ranks.values()).count)
        projectors = sorted({*self.routing, *self.averaged})
        exceptions = {name.replace(".", r"\."): r for name, r in ranks.items() if r != rank}
        blocks = {module: self.ranks_of(module) for module in ranks} if self.options["gate_lora"] else {}
        usual = max(blocks.values(), key=list(blocks.values()).count) if blocks else None
        merged = MAnyConfig(
            r=rank,
            lora_alpha=rank,  # the scaling is folded into the weights
            rank_pattern=exceptions,
            alpha_pattern=dict(exceptions),
            target_modules=_common(configs, "target_modules") if _same_layers(self.adapters) else sorted(ranks),
            modules_to_save=projectors or None,
            projector_modules=list(projectors),
            fan_in_fan_out=any(getattr(config, "fan_in_fan_out", False) for config in configs),
            task_type=_common(configs, "task_type"),
            auto_mapping=_common(configs, "auto_mapping"),
            base_model_name_or_path=_common(configs, "base_model_name_or_path"),
            revision=_common(configs, "revision"),
            inference_mode=True,
            energy=1.0,  # what the tasks' statistics kept is kept
            ridge=self.options["ridge"],
            router=self.options["router"],
            temperature=self.options["temperature"],
            top_k=self.options["top_k"],
            abstain_above=self.options["abstain_above"],
            gate_lora=self.options["gate_lora"],
            task_ranks=usual,
            task_rank_pattern={name.replace(".", r"\."): of for name, of in blocks.items() if of != usual},
            tasks=self.described_tasks(interference),
            operations=self.operations,
            routing=self.routing or None,
            averaged_projectors=self.averaged or None,
            method=_described(self.method),
            statistics=statistics,
        )
        if isinstance(merged.target_modules, set):
            # A set of strings is saved in another order by every process; the same merge should be the same file.
            merged.target_modules = sorted(merged.target_modules)
        return merged


def whole_rank(ranks: Sequence[int], shape: tuple[int, int], method: MergeMethod | None, gate_lora: bool) -> int:
    """The rank of a merged delta without a limit: `Σ r_t`, or what the method makes of it.

    Deltas of full rank do not add up to more than that, but where a gate keeps the tasks' blocks.

    Args:
        ranks (`Sequence[int]`): Of the tasks that trained the layer.
        shape (`tuple[int, int]`): `(out, in)` of the layer.
        method ([`MergeMethod`], *optional*): `None` is LPM.
        gate_lora (`bool`): Whether the merge has a gate.
    """
    whole = sum(ranks) if method is None else method.rank_of(ranks)
    return min(whole, *shape) if has_full_rank(ranks, shape) and not gate_lora else whole


def plan_merge(
    entries: Sequence[AdapterPath],
    *,
    weights: TaskWeights = None,
    without: Sequence[str] = (),
    task_names: Sequence[TaskNames] | None = None,
    method: str | MergeMethod = LPM,
    projectors: str = ROUTED,
    ridge: float | None = None,
    router: str | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    abstain_above: float | None = None,
    rank: int | None = None,
    gate_lora: bool | None = None,
    dtype: torch.dtype = torch.float32,
    hub: Mapping[str, Any],
    progress: bool,
    base: nn.Module | None = None,
) -> MergePlan:
    """Find and read the adapters and check that they can be merged; the arguments are those of merging.

    `base` is the base model, where there is one.

    Raises:
        ValueError, UnmergeableAdapterError, AdapterNotFoundError, StatisticsError: As merging says.
    """
    if isinstance(entries, (str, os.PathLike)) or not entries:
        raise ValueError("Give a list of at least one adapter to merge.")
    for name, given in (("weights", weights), ("task_names", task_names)):
        if given is not None and not isinstance(given, Mapping) and len(given) != len(entries):
            raise ValueError(f"`{name}` has {len(given)} entries for {len(entries)} adapters.")
    chosen = as_method(method)
    if projectors not in (ROUTED, MEAN):
        raise ValueError(f"`projectors` must be '{ROUTED}' or '{MEAN}', but it is {projectors!r}.")
    if chosen is not None and ridge is not None:
        raise ValueError(f"`ridge` is an option of LPM; the method '{chosen.name}' has none.")
    routing_options = {"router": router, "temperature": temperature, "top_k": top_k, "abstain_above": abstain_above}
    given = [f"`{name}`" for name, value in routing_options.items() if value is not None]
    if projectors == MEAN and (given or gate_lora):
        option = given[0] if given else "`gate_lora`"
        raise ValueError(f"{option} is an option of routed projectors, not of `projectors='{MEAN}'`.")
    if router is not None and router not in ROUTERS:
        raise ValueError(f"`router` must be one of {', '.join(map(repr, ROUTERS))}, but it is {router!r}.")
    if abstain_above is not None and not 0 < abstain_above < math.inf:
        raise ValueError(f"`abstain_above` must be positive and finite, but it is {abstain_above}.")
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
    numbers = list(weights.values() if isinstance(weights, Mapping) else weights or [])
    if not all(0 <= weight < math.inf for weight in numbers):
        raise ValueError(f"`weights` must be finite and not negative, but they are {numbers}.")
    adapters = [
        read_adapter(find_adapter(entry, **hub), task_names[i] if task_names is not None else None, base)
        for i, entry in enumerate(tqdm(entries, desc="Reading adapters", unit="adapter", disable=not progress))
    ]
    adapters = everything = with_current_names(adapters, base)
    tasks = weighted_tasks(adapters, weights)
    adapters, tasks = without_tasks(adapters, tasks, without)
    tasks.sort(key=lambda task: task.name)  # so that any order of the list gives the same merge to the bit
    check_tasks(tasks)
    check_measured(adapters, tasks, chosen, routed=projectors == ROUTED)
    check_same_base(adapters)
    merges = [
        adapter.config for adapter in adapters if isinstance(adapter.config, MAnyConfig) and adapter.config.tasks
    ]
    can_gate = chosen is None and projectors == ROUTED
    options = {
        "ridge": _first_known(ridge, _agreed(merges, "ridge"), DEFAULT_RIDGE) if chosen is None else None,
        "router": _first_known(router, _agreed(merges, "router"), DEFAULT_ROUTER),
        "top_k": _first_known(top_k, _agreed(merges, "top_k")),
        "rank": rank,
        "gate_lora": _first_known(gate_lora, _agreed(merges, "gate_lora") if can_gate else None, False),
        "dtype": dtype,
    }
    # Distances of one router are nothing to another.
    alike = merges if _agreed(merges, "router") == options["router"] else []
    options["temperature"] = _first_known(temperature, _agreed(alike, "temperature"), ROUTERS[options["router"]])
    options["abstain_above"] = _first_known(abstain_above, _agreed(alike, "abstain_above"))
    if options["abstain_above"] is not None and options["router"] != "gaussian":
        raise ValueError("`abstain_above` is a distance of `router='gaussian'`; cosines know none.")
    groups = shared_inputs(tasks)
    routing: dict[str, dict[str, Any]] = {}
    averaged: dict[str, list[str]] = {}
    if projectors == ROUTED:
        routing, tensors = route_projectors(tasks, options["router"], untrained_too=options["gate_lora"])
    else:
        averaged, tensors = average_projectors(tasks)
    if options["gate_lora"]:
        check_gate(chosen, routing, rank)
    check_whole_projectors(tasks, [*routing, *averaged])
    plan = MergePlan(adapters, tasks, groups, routing, averaged, tensors, chosen, options)
    return replace(plan, operations=operations_of(everything, without, plan.described_options()))


def _described(method: MergeMethod | None) -> dict[str, Any] | None:
    return None if method is None else method.describe()


def _identity(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _agreed(merges: Sequence[MAnyConfig], option: str) -> Any:
    """What all merges say of an option, else `None`."""
    return _same([getattr(merge, option) for merge in merges])


def _first_known(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _common(configs: Iterable[Any], field: str) -> Any:
    """The value that all configs which have one agree on, else `None`."""
    return _same([value for config in configs if (value := getattr(config, field, None))])


def _same(values: Sequence[Any]) -> Any:
    return values[0] if values and all(value == values[0] for value in values) else None


def _same_layers(adapters: Sequence[Adapter]) -> bool:
    """Whether all adapters say in the same words which layers they adapt, so that the merge may say it so too."""
    configs = [adapter.config for adapter in adapters]
    if _common(configs, "target_modules") is None:
        return False
    fewer = ("layers_to_transform", "exclude_modules")
    if any(getattr(config, name, None) not in (None, [], set(), "") for config in configs for name in fewer):
        return False  # there the words say less than half of it
    return len({frozenset(task.deltas) for adapter in adapters for task in adapter.tasks}) == 1
