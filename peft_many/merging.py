"""Merging task adapters: from folders and Hub ids to one adapter, with or without a base model in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .algebra.lpm import LeastSquaresMerge, LowRankDelta, SingularMergeError
from .plugin.adapter import KEY_PREFIX, Adapter, TaskAdapter, UnmergeableAdapterError, read_adapter
from .plugin.atomic import new_folder
from .plugin.config import DEFAULT_TEMPERATURE, MAnyConfig
from .plugin.fit import check_fits_model, untouched_on_failure
from .plugin.hub import find_adapter
from .plugin.statistics import AdapterStatistics, check_covariance, weight_fingerprint

DEFAULT_RIDGE = 1e-4
AdapterPath = str | os.PathLike[str]
TaskNames = str | Sequence[str] | None


@dataclass(frozen=True)
class MergedAdapter:
    """A merge in memory: its config, statistics included, and the tensors of its `adapter_model.safetensors`."""

    config: MAnyConfig
    tensors: dict[str, Tensor]


def merge_adapter_sequence(
    model: nn.Module,
    adapters: Sequence[AdapterPath],
    *,
    adapter_name: str = "default",
    weights: Sequence[float] | None = None,
    task_names: Sequence[TaskNames] | None = None,
    ridge: float | None = None,
    temperature: float | None = None,
    low_cpu_mem_usage: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> PeftModel:
    """Merge task adapters into one, on a base model (MAny, arXiv 2604.14016; equations in docs/method.md).

    Language-model deltas are merged by least squares on the layers' input covariances (LPM), projectors are routed per
    image by visual prototypes (CPM). No training; the order of the adapters does not matter.

    Args:
        model (`torch.nn.Module`):
            The base model, which is wrapped in place as by [`~peft.get_peft_model`]. If merging fails it is untouched.
        adapters (`Sequence[str]`):
            Local folders and Hub ids (`"me/adapter"`, `"me/adapter@revision"`), merges among them; MANY or LORA
            adapters that `collect_statistics` was run on.
        adapter_name (`str`, defaults to `"default"`):
            What the merge is called inside the returned model.
        weights (`Sequence[float]`, *optional*):
            One weight `w_t ≥ 0` for each adapter, all 1 by default; it multiplies those of a merge's tasks.
        task_names (`Sequence[str]`, *optional*):
            Names of the tasks, where the adapters do not say or clash; `None` entries keep the adapter's own, and a
            merge takes a list, in the order of its config's `tasks`.
        ridge (`float`, *optional*):
            `λ`, the share of the mean input energy added in every direction; it pulls unseen directions to the tasks'
            mean delta. 1e-8 to 1e-3 work alike on the demo, 1e-2 costs accuracy (docs/how-to.md). Defaults to that of
            the merges among the adapters, if they agree, and to 1e-4.
        temperature (`float`, *optional*):
            `τ` of the projector routing; 0.005 to 0.02 work alike on the demo, 0.1 costs accuracy (docs/how-to.md).
            Defaults to that of the merges among the adapters, if they agree, and to 0.02.
        low_cpu_mem_usage (`bool`, defaults to `False`):
            Create the adapter's weights on the meta device before they are filled.
        token (`str` or `bool`, *optional*):
            As in [`~huggingface_hub.snapshot_download`], like the next two.
        cache_dir (`str`, *optional*):
            Where Hub downloads are kept.
        local_files_only (`bool`, defaults to `False`):
            Use only what is in the cache.
        progress (`bool`, defaults to `True`):
            Show a progress bar.

    Returns:
        [`~peft.PeftModel`]: The base model with the merge as its one, active adapter, ready for inference.

    Raises:
        UnmergeableAdapterError: An adapter cannot be merged, or does not fit the others or the model.
        AdapterNotFoundError: An adapter is neither a folder nor reachable on the Hub.
        StatisticsError: An adapter's statistics are damaged.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model already has adapters; pass the base model (`model.unload()` gives it back).")
    merged = _merge(
        adapters,
        weights=weights,
        task_names=task_names,
        ridge=ridge,
        temperature=temperature,
        hub={"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only},
        progress=progress,
    )
    check_fits_model(merged.config, merged.tensors, model)
    config = replace(merged.config)
    config.base_model_name_or_path = None  # which get_peft_model sets to the model's own
    with untouched_on_failure(model):
        merged_model = get_peft_model(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        set_peft_model_state_dict(merged_model, merged.tensors, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    return merged_model.eval()


def merge_adapter_files(
    adapters: Sequence[AdapterPath],
    output_dir: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    task_names: Sequence[TaskNames] | None = None,
    ridge: float | None = None,
    temperature: float | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> Path:
    """Merge task adapters into a new adapter folder, without loading any base model.

    The folder is written whole or not at all, and loads with `PeftModel.from_pretrained(base, folder)`.

    The arguments are those of [`merge_adapter_sequence`], and:

    Args:
        output_dir (`str`): The folder to create; it must not exist, or be empty.

    Returns:
        `Path`: The folder.

    Raises:
        FileExistsError: The output folder exists and is not empty.
        UnmergeableAdapterError, AdapterNotFoundError, StatisticsError: As in [`merge_adapter_sequence`].
    """
    output = Path(output_dir).expanduser()
    with new_folder(output) as folder:
        merged = _merge(
            adapters,
            weights=weights,
            task_names=task_names,
            ridge=ridge,
            temperature=temperature,
            hub={"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only},
            progress=progress,
        )
        save_file(merged.tensors, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        merged.config.save_pretrained(folder)
    return output


def _merge(
    entries: Sequence[AdapterPath],
    *,
    weights: Sequence[float] | None,
    task_names: Sequence[TaskNames] | None,
    ridge: float | None,
    temperature: float | None,
    hub: Mapping[str, Any],
    progress: bool,
) -> MergedAdapter:
    if isinstance(entries, (str, os.PathLike)) or not entries:
        raise ValueError("Give a list of at least one adapter to merge.")
    for name, given in (("weights", weights), ("task_names", task_names)):
        if given is not None and len(given) != len(entries):
            raise ValueError(f"`{name}` has {len(given)} entries for {len(entries)} adapters.")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"`temperature` must be positive, but it is {temperature}.")
    if ridge is not None and not 0 <= ridge < math.inf:
        raise ValueError(f"`ridge` must be finite and not negative, but it is {ridge}.")
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
    ridge = ridge if ridge is not None else _common(merges, "ridge") or DEFAULT_RIDGE
    temperature = temperature if temperature is not None else _common(merges, "temperature") or DEFAULT_TEMPERATURE
    deltas = _merge_deltas(tasks, ridge, progress)
    routing, projector_tensors = _merge_projectors(tasks)
    tensors = {f"{KEY_PREFIX}{name}.lora_A.weight": delta.A.contiguous() for name, delta in deltas.items()}
    tensors |= {f"{KEY_PREFIX}{name}.lora_B.weight": delta.B.contiguous() for name, delta in deltas.items()}
    tensors |= {f"{KEY_PREFIX}{name}": tensor.contiguous() for name, tensor in projector_tensors.items()}
    return MergedAdapter(_merged_config(adapters, tasks, deltas, routing, ridge, temperature), tensors)


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


def _merge_deltas(tasks: Sequence[TaskAdapter], ridge: float, progress: bool) -> dict[str, LowRankDelta]:
    """LPM: one least-squares problem for each group of layers that share their input in every task."""
    merged: dict[str, LowRankDelta] = {}
    groups = _shared_inputs(tasks)
    layers = sum(len(modules) for modules in groups)
    with tqdm(total=layers, desc=f"Merging {len(tasks)} tasks", unit="layer", disable=not progress) as bar:
        for modules in groups:
            problem = LeastSquaresMerge(ridge)
            for task in tasks:
                covariance = task.statistics.covariances.get(modules[0])
                if covariance is not None:
                    check_covariance(covariance, f"{task.source}: the covariance of '{modules[0]}'")
                    problem.add(covariance, {m: task.deltas[m] for m in modules if m in task.deltas}, task.weight)
            try:
                merged |= problem.solve()
            except SingularMergeError as error:
                raise UnmergeableAdapterError(f"'{modules[0]}' cannot be merged: {error}.") from None
            bar.update(len(modules))
    return merged


def _shared_inputs(tasks: Sequence[TaskAdapter]) -> list[list[str]]:
    """The layers that any task trained, grouped by the covariances that describe their input; shapes are checked."""
    shapes: dict[str, tuple[tuple[int, int], TaskAdapter]] = {}
    for task in tasks:
        for module, delta in task.deltas.items():
            shape = (delta.B.shape[0], delta.A.shape[1])
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


def _merge_projectors(tasks: Sequence[TaskAdapter]) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """CPM: every task's projector and prototype side by side; tasks that saw no image take no part."""
    routing: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for projector in sorted({name for task in tasks for name in task.projectors}):
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


def _merged_config(
    adapters: Sequence[Adapter],
    tasks: Sequence[TaskAdapter],
    deltas: Mapping[str, LowRankDelta],
    routing: dict[str, dict[str, Any]],
    ridge: float,
    temperature: float,
) -> MAnyConfig:
    configs = [adapter.config for adapter in adapters]
    ranks = {name: delta.A.shape[0] for name, delta in deltas.items()}
    rank = max(ranks.values(), key=list(ranks.values()).count)
    exceptions = {name.replace(".", r"\."): r for name, r in ranks.items() if r != rank}
    measured, rows = [], dict.fromkeys(deltas, 0)
    for task in tasks:
        fingerprints = {}
        for name, delta in task.deltas.items():
            start, rows[name] = rows[name], rows[name] + delta.A.shape[0]
            fingerprints[name] = weight_fingerprint(deltas[name].A[start : rows[name]], delta.B)
        own = {name: delta.A for name, delta in task.deltas.items()}
        measured.append(
            replace(task.statistics, name=task.name, weight=task.weight, deltas=own, fingerprints=fingerprints)
        )
    merged = MAnyConfig(
        r=rank,
        lora_alpha=rank,  # the scaling is folded into the weights
        rank_pattern=exceptions,
        alpha_pattern=dict(exceptions),
        target_modules=_common(configs, "target_modules") if _same_layers(adapters) else sorted(deltas),
        modules_to_save=sorted(routing) or None,
        projector_modules=sorted(routing),
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        task_type=_common(configs, "task_type"),
        auto_mapping=_common(configs, "auto_mapping"),
        base_model_name_or_path=_common(configs, "base_model_name_or_path"),
        revision=_common(configs, "revision"),
        inference_mode=True,
        energy=1.0,  # what the tasks' statistics kept is kept
        ridge=ridge,
        temperature=temperature,
        tasks=[{"name": task.name, "weight": task.weight, **task.provenance} for task in tasks],
        routing=routing or None,
        statistics=AdapterStatistics(tuple(measured)),
    )
    if isinstance(merged.target_modules, set):
        # A set of strings is saved in another order by every process; the same merge should be the same file.
        merged.target_modules = sorted(merged.target_modules)
    return merged


def _common(configs: Iterable[Any], field: str) -> Any:
    """The value that all configs which have one agree on, else `None`."""
    values = [getattr(config, field) for config in configs if getattr(config, field)]
    return values[0] if values and all(value == values[0] for value in values) else None


def _same_layers(adapters: Sequence[Adapter]) -> bool:
    """Whether all adapters say in the same words which layers they adapt, so that the merge may say it so too."""
    configs = [adapter.config for adapter in adapters]
    if _common(configs, "target_modules") is None:
        return False
    if any(config.layers_to_transform is not None or config.exclude_modules for config in configs):
        return False  # there the words say less than half of it
    return len({frozenset(task.deltas) for adapter in adapters for task in adapter.tasks}) == 1
