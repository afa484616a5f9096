"""Before a merge: everything is read and checked but the weights themselves, and nothing is computed yet."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mode

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..algebra.lpm import has_full_rank
from ..algebra.scatter import multiplications
from ..files.adapter import Adapter, TaskAdapter, read_without_hash, with_hashes
from ..files.errors import UnmergeableAdapterError
from ..files.older_names import with_current_names
from ..files.patterns import exceptions_by_pattern
from ..files.statistics import group_by_input
from ..files.tensor_file import TensorFile
from ..files.tensor_keys import KEY_PREFIX, TASK_WEIGHT, lora_key
from ..hub.sources import HubArguments, find_adapter
from ..records import (
    MergeOptions,
    MergeRecord,
    Operation,
    RoutedInstructions,
    RoutedProjector,
    TaskRecord,
)
from ..records.options import IMAGES, ROUTED
from .arguments import check_arguments, several
from .base_tensors import check_base_tensors, common_base_tensors, keys_beside
from .checks import check_measured, check_same_shape, check_tasks, check_whole_projectors
from .expected_routing import DrawnInputs
from .mean_projectors import average_projectors
from .operations import operations_of
from .routed_instructions import route_instructions
from .routed_projectors import route_projectors
from .same_base import check_same_base
from .selection import TaskWeights, select_tasks

AdapterPath = str | os.PathLike[str]
TaskNames = str | Sequence[str] | None


@dataclass(frozen=True)
class PreparedMerge:
    """A merge that can be carried out: tasks that fit together, options, and what will come out."""

    adapters: Sequence[Adapter]  # in the order in which they were given
    tasks: Sequence[TaskAdapter]  # of all adapters, sorted by name
    groups: Sequence[Sequence[str]]  # the layers that share their input in every task; one problem to solve each
    options: MergeOptions  # with nothing left open
    routing: dict[str, RoutedProjector]
    instructions: RoutedInstructions | None
    averaged: dict[str, list[str]]  # by averaged projector, the tasks in the mean
    routed_tensors: dict[str, Tensor]  # experts and routers, on disk until they are used; or projectors' means
    base_tensors: dict[str, Tensor]  # those of the base model that lie beside the adapters, and will beside the merge
    operations: list[Operation]  # what was done to make the adapters, and this merge

    @property
    def layers(self) -> list[str]:
        return [layer for group in self.groups for layer in group]

    @property
    def files(self) -> list[TensorFile]:
        """The files that weights and statistics are mapped from."""
        return [file for adapter in self.adapters for file in adapter.files]

    def release(self) -> None:
        """Give back the memory of what was read of the files so far."""
        for file in self.files:
            file.release()

    def ranks_of(self, layer: str) -> list[int]:
        """`r_t` of each task in a layer, zero where a task did not train it."""
        return [task.deltas[layer].rank if layer in task.deltas else 0 for task in self.tasks]

    def rank_of(self, layer: str) -> int:
        """The rank of a layer's merged delta: `Σ r_t` or what the method makes of it, and what `rank` allows."""
        shape, options = self.shape_of(layer), self.options
        ranks = [rank for rank in self.ranks_of(layer) if rank]
        rank = sum(ranks) if options.merge_method is None else options.merge_method.rank_of(ranks)
        if has_full_rank(ranks, shape) and not options.gate_lora:
            rank = min(rank, *shape)  # deltas of full rank add up to no more, but a gate keeps the tasks' blocks
        return rank if options.rank is None else min(rank, options.rank)

    def shape_of(self, layer: str) -> tuple[int, int]:
        """`(out, in)` of a layer."""
        return next(task.deltas[layer].shape for task in self.tasks if layer in task.deltas)

    def cost_of(self, group: Sequence[str]) -> float:
        """Multiplications that merging a group takes, for sharing groups out; by other methods, in proportion."""
        if self.options.merge_method is not None:
            return float(sum(math.prod(self.shape_of(layer)) for layer in group))
        covariances = [task.statistics.covariance_of(group[0]) for task in self.tasks]
        rank = sum(covariance.rank for covariance in covariances if covariance is not None)
        return multiplications(self.shape_of(group[0])[1], rank, sum(sum(self.ranks_of(layer)) for layer in group))

    @property
    def whole_tensors(self) -> dict[str, Tensor]:
        """What the weights file holds beside the merged LoRA, by key without PEFT's prefix."""
        return {**self.routed_tensors, **self.base_tensors}

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of everything in the merge's weights file."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for layer in self.layers:
            (out, width), rank, dtype = self.shape_of(layer), self.rank_of(layer), self.options.dtype
            found[lora_key(layer, "A")] = (dtype, (rank, width))
            found[lora_key(layer, "B")] = (dtype, (out, rank))
            if self.options.gate_lora:
                found[f"{KEY_PREFIX}{layer}.{TASK_WEIGHT}"] = (dtype, (rank, width))
        for name, tensor in self.whole_tensors.items():
            found[f"{KEY_PREFIX}{name}"] = (tensor.dtype, tuple(tensor.shape))
        return found

    @functools.cached_property
    def drawn_inputs(self) -> DrawnInputs:
        """What tells where inputs are expected to go."""
        heard = {task.name: task.statistics for task in self.tasks if task.weight > 0}
        return DrawnInputs(self.options, self.routing, heard)

    def record(self, interference: Mapping[str, float] | None = None) -> MergeRecord:
        """What the merge's config will say of it; `interference` is what merging costs each task, once it is known."""
        blocks = {layer: self.ranks_of(layer) for layer in self.layers} if self.options.gate_lora else {}
        usual = list(mode(map(tuple, blocks.values()))) if blocks else None
        return MergeRecord(
            options=self.options,
            tasks=[_task_record(task, (interference or {}).get(task.name)) for task in self.tasks],
            operations=self.operations,
            routing=self.routing,
            instructions=self.instructions,
            expected_routing={name: found.kept() for name, found in self.drawn_inputs.expected.items()},
            averaged_projectors=self.averaged,
            task_ranks=usual,
            task_rank_pattern=exceptions_by_pattern(blocks, usual),
        )


def _task_record(task: TaskAdapter, interference: float | None) -> TaskRecord:
    left_out = (sorted(task.projectors) if task.weight == 0 else []) or task.origin.projectors_left_out
    return TaskRecord(
        name=task.name,
        weight=task.weight,
        origin=replace(task.origin, projectors_left_out=left_out, base_tensors=sorted(task.base_tensors)),
        samples=task.statistics.samples,
        images=task.statistics.images,
        prompts=task.statistics.kept_prompts,
        interference=interference,
    )


def prepare_merge(
    entries: Sequence[AdapterPath],
    options: MergeOptions,
    *,
    weights: TaskWeights = None,
    without: Sequence[str] = (),
    task_names: Sequence[TaskNames] | None = None,
    hub: HubArguments,
    progress: bool,
    same_base: bool = False,
    base: nn.Module | None = None,
) -> PreparedMerge:
    """Find and read the adapters and check that they can be merged; arguments and errors are those of merging."""
    entries = several(entries)
    check_arguments(entries, weights, without, task_names)
    read = [
        read_without_hash(find_adapter(entry, **hub), task_names[i] if task_names is not None else None, base)
        for i, entry in enumerate(tqdm(entries, desc="Reading adapters", unit="adapter", disable=not progress))
    ]
    everything = with_current_names(with_hashes(read), base)
    adapters = select_tasks(everything, weights, without)
    tasks = [task for adapter in adapters for task in adapter.tasks]
    tasks.sort(key=lambda task: task.name)  # so that any order of the list gives the same merge to the bit
    check_tasks(tasks)
    check_measured(adapters, tasks, options)
    options = options.filled_in([adapter.merge.options for adapter in adapters if adapter.merge is not None])
    routing: dict[str, RoutedProjector] = {}
    averaged: dict[str, list[str]] = {}
    if options.projectors == ROUTED:
        routing, tensors = route_projectors(tasks, str(options.router), untrained_too=options.gates_by_images)
    else:
        averaged, tensors = average_projectors(tasks)
    if options.gate_lora and options.gate_by == IMAGES and not routing:
        raise UnmergeableAdapterError(
            "`gate_lora` goes by the tasks' visual prototypes, but none of the adapters has one: no image passed "
            "while their statistics were collected. Pass `gate_by='instructions'`."
        )
    instructions, asked = route_instructions(tasks) if options.gates_by_instructions else (None, {})
    check_whole_projectors(tasks, [*routing, *averaged])
    groups = _shared_inputs(tasks)
    check_same_base(adapters, same_base, base is not None, hub.get("cache_dir"))
    base_tensors = common_base_tensors(tasks)
    if base is not None:
        check_base_tensors(base_tensors, base)
    beside = keys_beside(base_tensors, [layer for group in groups for layer in group])
    operations = operations_of(everything, without, options)
    return PreparedMerge(
        adapters, tasks, groups, options, routing, instructions, averaged, {**tensors, **asked}, beside, operations
    )


def _shared_inputs(tasks: Sequence[TaskAdapter]) -> list[list[str]]:
    """The layers that any task trained, those that share their input in every task together."""
    found: dict[str, list[tuple[TaskAdapter, tuple[int, int]]]] = {}
    for task in tasks:
        for layer, delta in task.deltas.items():
            found.setdefault(layer, []).append((task, delta.shape))
    for layer, shapes in found.items():
        check_same_shape(f"The shape of '{layer}'", shapes)
    return group_by_input(sorted(found), [task.statistics.input_of for task in tasks])
