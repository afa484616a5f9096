"""A full transformers model: the deltas folded into the weights, and one fixed projector, which is not routed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..mean_projectors import average_projectors
from ..plan import AdapterPath
from ..plugin.adapter import Adapter, read_adapter
from ..plugin.config import MAnyConfig
from ..plugin.hub import find_adapter
from .folding import BaseModel, copy_besides, folded, load_base
from .result import Export, new_folder, write_card

Projectors = dict[str, dict[str, Tensor]]

_USAGE = """from transformers import {kind}

model = {kind}.from_pretrained("this/model")
"""


def export_model(
    adapter: AdapterPath,
    output_dir: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    projector: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Export:
    """Fold a merge or an adapter into its base model and write a full model, which loads without this package.

    A plain model has one projector, which cannot be the routed mixture. It is the mean of the tasks' projectors by
    their weights, over the tasks that trained one, or with `projector` that of one task. On text the outputs are
    those of the adapter, up to the rounding of the base model's dtype. On images the mean loses much of what the
    tasks taught their projectors; `projector_loss` says how far it is from each. (To merge projectors by least squares
    as the LoRAs are, the covariances of their layers' inputs would be needed, patch by patch; the statistics hold
    means over each image only.)

    Args:
        adapter (`str`): The folder or Hub id of a merge, or of one task's adapter.
        output_dir (`str`): The folder to create; it must not exist, or be empty.
        base_model (`str`, *optional*): Folder or Hub id (`"me/model@revision"`), if the adapter does not say it.
        projector (`str`, *optional*): The task whose projector is kept. Of averaged projectors there is only the mean.
        token, cache_dir, local_files_only: As in [`~huggingface_hub.snapshot_download`].

    Returns:
        [`Export`]: The folder, what is lost, and how far the projector is from each task's.

    Raises:
        ValueError: There is no such task, or nobody says which the base model is.
        UnmergeableAdapterError: The adapter is damaged, or does not fit the base model.
        FileNotFoundError, FileExistsError, StatisticsError: As in [`merge_adapter_files`].
    """
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    read = read_adapter(find_adapter(adapter, **hub))
    base = BaseModel.of(base_model, read)
    projectors = _projectors(read, projector)
    output = Path(output_dir).expanduser()
    with new_folder(output, read, "model", base, projector) as partial:
        model = load_base(base, hub)
        before = {name: _state(model, name) for name in _trained(read)}
        plain = folded(model, read, projectors)
        after = {name: _state(plain, name) for name in before}
        loss = _projector_loss(read, before, after)
        plain.save_pretrained(partial.folder)
        notes = _notes(read, projector, loss)
        if not copy_besides(base, partial.folder, hub):
            notes.append("No tokenizer or processor was found beside the base model, so none is here.")
        title = f"A model with {len(read.tasks)} task{'s' if len(read.tasks) > 1 else ''} folded in"
        usage = _USAGE.format(kind=type(plain).__name__)
        write_card(partial.folder, title, read, base.name, usage, notes, library_name="transformers")
    return Export(output, notes, loss)


def _projectors(adapter: Adapter, task_name: str | None) -> Projectors:
    """The state dict of each projector that is not to be the base model's."""
    if task_name is None:
        _, tensors = average_projectors(adapter.tasks)
        found: Projectors = {}
        for name in _trained(adapter):
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            found |= {name: own} if own else {}
        return found
    task = next((task for task in adapter.tasks if task.name == task_name), None)
    if task is None:
        names = ", ".join(repr(task.name) for task in adapter.tasks)
        raise ValueError(f"`projector` names the task '{task_name}', but the tasks are {names}.")
    averaged = getattr(adapter.config, "averaged_projectors", None) or {}
    mean = next((name for name, tasks in averaged.items() if len(tasks) > 1), None)
    if mean is not None:
        raise ValueError(f"The projector '{mean}' is the mean of several tasks' already; leave `projector` out.")
    return {name: dict(tensors) for name, tensors in task.projectors.items()}


def _trained(adapter: Adapter) -> list[str]:
    return sorted({name for task in adapter.tasks for name in task.projectors})


def _state(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """Copies of a projector's tensors; nothing if the model has none of that name, which folding will say."""
    module = dict(model.named_modules()).get(name)
    return {} if module is None else {key: tensor.clone() for key, tensor in module.state_dict().items()}


def _projector_loss(
    adapter: Adapter, before: Mapping[str, Mapping[str, Tensor]], after: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """`‖θ − θ_t‖ / ‖θ_t − θ_0‖` by projector and task, in the Frobenius norm of all its tensors; sums are float64."""
    if getattr(adapter.config, "averaged_projectors", None):
        return {}  # the tasks' own are not known
    return {
        name: {
            task.name: _distance(state, task.projectors[name])
            / max(_distance(before[name], task.projectors[name]), 1e-30)
            for task in adapter.tasks
            if name in task.projectors
        }
        for name, state in after.items()
    }


def _distance(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    parts = [(one[key].double() - two[key].double()).square().sum() for key in two if two[key].is_floating_point()]
    return torch.stack(parts).sum().sqrt().item()


def _notes(adapter: Adapter, task_name: str | None, loss: Mapping[str, Mapping[str, float]]) -> list[str]:
    notes: list[Any] = []
    if isinstance(adapter.config, MAnyConfig) and adapter.config.gate_lora:
        notes.append("It has the merged LoRA for all inputs; images choose no task's own any more (`gate_lora`).")
    several = len(adapter.tasks) > 1
    for name, by_task in loss.items():
        which = f"that of '{task_name}'" if task_name is not None else "the mean of the tasks' by their weights"
        if several:
            shares = ", ".join(f"{task} {share:.0%}" for task, share in by_task.items())
            notes.append(
                f"The projector '{name}' is {which}; it is not routed any more. Distance from each task's own, as a "
                f"share of how far training moved that (0 %: its own, 100 %: as far as the base model's): {shares}. "
                "Expect answers about images to be worse, for tasks at 50 % and more much worse; text is not affected."
            )
    if not notes:
        notes.append("Outputs are the adapter's, up to rounding.")
    return notes
