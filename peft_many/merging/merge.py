"""Merging task adapters: from folders and Hub ids to one adapter, with or without a base model in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from ..algebra.precision import without_autocast
from ..files.atomic import shared_folder
from ..files.card import check_card, copy_card
from ..files.processes import ALONE, all_processes
from ..files.tensor_file import TensorFileWriter, lay_out
from ..files.tensor_keys import KEY_PREFIX
from ..records import MergeOptions
from ..records.keywords import takes_merge_options
from ..tuner.adapter_names import trouble_with
from ..tuner.merged_linear import round_merge
from .arguments import output_folder, replaced_by_merge, several, usable_device
from .base_model import check_fits_model, untouched_on_failure
from .group import LayerRecord, mean_residuals, merge_groups
from .merged_config import merged_config
from .merged_statistics import merged_statistics, statistics_copied_meanwhile
from .offloaded import check_dispatched, is_offloaded, load_on_offloaded
from .prepare import AdapterPath, PreparedMerge, TaskNames, prepare_merge
from .selection import TaskWeights


@takes_merge_options
@without_autocast()
def merge_adapter_sequence(
    model: nn.Module,
    adapters: Sequence[AdapterPath],
    *,
    adapter_name: str = "default",
    weights: TaskWeights = None,
    without: Sequence[str] = (),
    task_names: Sequence[TaskNames] | None = None,
    device: str | torch.device = "cpu",
    low_cpu_mem_usage: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: bool = True,
    **options: Any,
) -> PeftModel:
    """Merge task adapters into one adapter on a base model, without training (MAny, arXiv 2604.14016).

    The LoRA deltas of the language model are merged by least squares on the layers' input covariances (LPM). Each
    image is routed through the tasks' projectors by visual prototypes (CPM). The order of the adapters does not
    matter. `method=` chooses another method, for comparison or for adapters without statistics. The equations are in
    docs/method.md.

    Six adapters of LLaVA-1.5-7B's size take about a minute and 1.3 GB beside the model on two CPU cores.

    Args:
        model (`torch.nn.Module`):
            The base model, which is wrapped in place as by [`~peft.get_peft_model`]. If merging fails it is untouched.
        adapters (`Sequence[str]`):
            Local folders and Hub ids (`"me/adapter"`, `"me/adapter@revision"`), merges among them; adapters of type
            MANY, LORA and others (docs/how-to/other-peft-methods.md) that `collect_statistics` was run on, if the
            method needs that.
        adapter_name (`str`, defaults to `"default"`): What the merge is called inside the returned model.
        weights (`Sequence[float]` or `Mapping[str, float]`, *optional*):
            One weight `w_t ≥ 0` for each adapter, all 1 by default; it multiplies those of a merge's tasks. Or weights
            by task name, in place of the tasks' own; tasks that are not named keep theirs. To LPM, RegMean and
            averages only their ratios matter; by other methods they multiply the tasks' deltas.
        without (`Sequence[str]`, defaults to `()`):
            Names of tasks that are left out, as if they had never been merged.
        task_names (`Sequence[str]`, *optional*):
            Names of the tasks, where the adapters do not say or clash; `None` entries keep the adapter's own, and a
            merge takes a list, in the order of its config's `tasks`.
        device (`str` or `torch.device`, defaults to `"cpu"`):
            Where to compute. One without float64 (Apple's `"mps"`) leaves the computing to the CPU, to the same bits.
        low_cpu_mem_usage (`bool`, defaults to `False`):
            Create the adapter's weights on the meta device before they are filled.
        token (`str` or `bool`, *optional*): As in [`~huggingface_hub.snapshot_download`], like the next two.
        cache_dir (`str`, *optional*): Where Hub downloads are kept.
        local_files_only (`bool`, defaults to `False`): Use only what is in the cache.
        progress (`bool`, defaults to `True`): Show a progress bar.
        **options: How to merge: `method`, `ridge`, `rank`, `router` and all others of [`MergeOptions`].

    Returns:
        [`~peft.PeftModel`]: The base model with the merge as its only and active adapter, in evaluation mode.

    Raises:
        UnmergeableAdapterError: An adapter cannot be merged, or does not fit the others, the method or the model.
        AdapterNotFoundError: An adapter is neither a folder nor reachable on the Hub.
        StatisticsError: An adapter's statistics are damaged.
        ValueError: An argument is impossible, or the model has adapters or weights that were offloaded without a
            device map.

    Example:

        ```py
        >>> from peft_many import merge_adapter_sequence

        >>> model = merge_adapter_sequence(base, ["iconqa", "clevr"], weights=[1.0, 2.0])
        >>> model.peft_config["default"].merge.names
        ['clevr', 'iconqa']
        ```
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"`model` must be the loaded base model, but it is a {type(model).__name__}; the adapters come second. "
            "`merge_adapter_files` needs no model."
        )
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model already has adapters; pass the base model (`model.unload()` gives it back).")
    if (problem := trouble_with(adapter_name, model)) is not None:
        raise ValueError(problem)
    check_dispatched(model)
    chosen, device = MergeOptions(**options), usable_device(device)
    prepared = prepare_merge(
        adapters,
        chosen,
        weights=weights,
        without=without,
        task_names=task_names,
        hub={"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only},
        progress=progress,
        base=model,
    )
    config = merged_config(prepared, prepared.record())
    config.loaded_from = "The merge"  # some of its words are the adapters' own, and are not trusted
    check_fits_model(config, {key: shape for key, (_, shape) in prepared.tensors().items()}, model)
    tensors = {f"{KEY_PREFIX}{name}": tensor for name, tensor in prepared.routed_tensors.items()}
    records = merge_groups(prepared, prepared.groups, tensors.update, device, progress)
    config.statistics = merged_statistics(prepared, records, in_memory=True)
    config.merge = prepared.record(mean_residuals(records))
    if config.base_model_name_or_path != getattr(model, "name_or_path", None):
        config.base_model_name_or_path = config.revision = None  # get_peft_model sets it to the model's own
    if is_offloaded(model):
        return load_on_offloaded(model, config, tensors, adapter_name)
    with untouched_on_failure(model):
        merged_model = get_peft_model(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        set_peft_model_state_dict(merged_model, tensors, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        round_merge(model, adapter_name, config)
    return merged_model.eval()


@takes_merge_options
@without_autocast()
def merge_adapter_files(
    adapters: Sequence[AdapterPath],
    output_dir: str | os.PathLike[str],
    *,
    weights: TaskWeights = None,
    without: Sequence[str] = (),
    task_names: Sequence[TaskNames] | None = None,
    same_base: bool = False,
    overwrite: bool = False,
    across_processes: bool = False,
    device: str | torch.device = "cpu",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Merge task adapters into a new adapter folder, without loading any base model.

    The folder is written whole or not at all, and loads with `PeftModel.from_pretrained(base, folder)`. Groups of
    layers that share an input are read, merged and written at the same time: in memory are at most three on a CPU and
    seven on a GPU, whatever the depth of the model, each of them about as large as in the files ([`merge_groups`]).

    The arguments are those of [`merge_adapter_sequence`], and:

    Args:
        output_dir (`str`): The folder to create; it must not exist, or be empty, or see `overwrite`.
        same_base (`bool`, defaults to `False`):
            Take the adapters' base models for one, whatever they are called. Without it, names that differ are
            compared as folders, where they are here; models that differ are refused, and doubts are a warning.
        overwrite (`bool`, defaults to `False`):
            Replace an adapter that is in the output folder, whole and at the end. Of those merged it may be a merge,
            whose tasks the new one holds, but no task's own adapter. Your own text in its model card stays.
        across_processes (`bool`, defaults to `False`):
            Share the groups out over the processes of a distributed run, which must all make this call. By default
            the process that calls merges alone, so that only one should (`if accelerator.is_main_process:`).

    Returns:
        `Path`: The folder.

    Raises:
        FileExistsError: The output folder exists and is not empty, holds more than an adapter, or is one of those
            merged.
        BlockingIOError: Another process is writing there.
        TimeoutError, ProcessFailedError: With `across_processes`, another process did not make the call, or failed.
        UnmergeableAdapterError, AdapterNotFoundError, StatisticsError: As in [`merge_adapter_sequence`].

    Example:

        ```py
        >>> from peft_many import merge_adapter_files

        >>> merge_adapter_files(["iconqa", "clevr", "vizwiz"], "all-three", ridge=1e-4)
        PosixPath('all-three')
        ```
    """
    output = output_folder(output_dir)

    def prepare() -> tuple[PreparedMerge, torch.device, list[str]]:
        chosen, computing = MergeOptions(**options), usable_device(device)
        given = several(adapters)
        replaced = replaced_by_merge(output, overwrite, given)  # before anything is read
        check_card(output)
        prepared = prepare_merge(
            given,
            chosen,
            weights=weights,
            without=without,
            task_names=task_names,
            hub={"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only},
            progress=progress,
            same_base=same_base,
        )
        return prepared, computing, replaced

    processes = all_processes("merge_adapter_files") if across_processes else ALONE
    prepared, computing, replaced = processes.together(prepare)
    with shared_folder(output, replaced, processes) as folder, contextlib.ExitStack() as meanwhile:
        weights_file = folder / SAFETENSORS_WEIGHTS_NAME
        completing: list[Callable[[Mapping[str, LayerRecord]], None]] = []

        def begin() -> None:
            lay_out(weights_file, prepared.tensors(), {"format": "pt"})
            completing.append(meanwhile.enter_context(statistics_copied_meanwhile(prepared, folder)))
            completing.append(meanwhile.enter_context(_whole_tensors_copied_meanwhile(prepared, weights_file)))

        processes.in_one(begin)
        groups = processes.share(prepared.groups, prepared.cost_of)
        everyones = processes.every(lambda: _merge_into_file(prepared, groups, weights_file, computing, progress))
        records = {layer: record for found in everyones for layer, record in found.items()}
        processes.in_one(lambda: _complete(prepared, records, folder, output))
        processes.in_one(lambda: [complete(records) for complete in completing])
    return output


def _merge_into_file(
    prepared: PreparedMerge, groups: Sequence[Sequence[str]], weights_file: Path, device: torch.device, progress: bool
) -> dict[str, LayerRecord]:
    """Merge groups of layers into a file; what is to be recorded of each layer."""
    with TensorFileWriter(weights_file) as writer:

        def write(tensors: dict[str, Tensor]) -> None:
            for key, tensor in tensors.items():
                writer.write(key, tensor)

        return merge_groups(prepared, groups, write, device, progress)


@contextlib.contextmanager
def _whole_tensors_copied_meanwhile(
    prepared: PreparedMerge, weights_file: Path
) -> Iterator[Callable[[Mapping[str, LayerRecord]], None]]:
    """Copy what a merge takes over as it is while the block merges layers; it gets what waits for the copy."""

    def copy() -> None:
        with TensorFileWriter(weights_file) as writer:
            for name, tensor in prepared.whole_tensors.items():
                writer.write(f"{KEY_PREFIX}{name}", tensor)

    with ThreadPoolExecutor(1, "peft_many projectors") as executor:
        copying = executor.submit(copy)
        yield lambda records: copying.result()


def _complete(prepared: PreparedMerge, records: dict[str, LayerRecord], folder: Path, output: Path) -> None:
    """Write all of a merge but its tensors; what is not ours in the card that is replaced stays."""
    copy_card(output, folder)
    merged_config(prepared, prepared.record(mean_residuals(records))).save_pretrained(folder)
