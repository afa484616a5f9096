"""A full transformers model: the deltas folded into the weights, and one fixed projector, which is not routed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files.adapter import Adapter, read_adapter
from ..files.atomic import new_folder
from ..hub.sources import find_adapter
from ..merging.prepare import AdapterPath
from .folding import GATE_LOST, NO_TOKENIZER, BaseModel, copy_besides, folded, load_base
from .one_projector import ProjectorBench, benches
from .result import Export, with_names_of, write_card

# Measured with the six tasks of docs/mini-ucit.md, one seed, 150 pictures each.
_SEEN = (
    "on the tiny LLaVA of peft_many's Mini-UCIT, right answers about images fell from 71 % to 29 % with shares of 6 "
    "to 25 %, and to 19 % with the mean of the projectors"
)

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

    On text the outputs are those of the adapter, up to the rounding of the base model's dtype. On images much is lost:
    a plain model has one projector, which cannot be the routed mixture. By default it is the tasks' projectors merged
    in closed form: layer by layer, the least-squares fit to what each task's own gives on images like its task's. The
    statistics know the images' means over their patches and how these vary, so that is what it is fitted on: Gaussian
    draws of image means, where single patches vary more. On the tiny LLaVA of Mini-UCIT this answers 29 % rightly, the
    mean of the projectors 19 %, one task's own 18 and 20 % (that task as ever), and routing 71 %. A projector that
    cannot be run on image means (one that wants its patches in a grid, or merges several into one), or whose tasks
    have no spreads, becomes the mean of the tasks' by their weights. `projector_loss` says how much of each task's
    projector training is lost.

    Args:
        adapter (`str`): The folder or Hub id of a merge, or of one task's adapter.
        output_dir (`str`): The folder to create; it must not exist, or be empty.
        base_model (`str`, *optional*): Folder or Hub id (`"me/model@revision"`), if the adapter does not say it.
        projector (`str`, *optional*):
            The task whose projector is kept in place of the fit. Of averaged projectors there is only the mean.
        token (`str` or `bool`, *optional*): As in [`~huggingface_hub.snapshot_download`], like the next two.
        cache_dir (`str`, *optional*): Where Hub downloads are kept.
        local_files_only (`bool`, defaults to `False`): Use only what is in the cache.

    Returns:
        [`Export`]: The folder, and what is lost.

    Raises:
        ValueError: There is no such task, or nobody says which the base model is.
        UnmergeableAdapterError: The adapter is damaged, or does not fit the base model.
        FileNotFoundError, FileExistsError, StatisticsError: As in [`merge_adapter_files`].
    """
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    read = read_adapter(find_adapter(adapter, **hub))
    base = BaseModel.of(base_model, read)
    _check_task(read, projector)
    output = Path(output_dir).expanduser()
    with new_folder(output) as folder:
        model = load_base(base, hub)
        read = with_names_of(read, model)
        found = [_chosen(bench, read, projector) for bench in benches(model, read.tasks)]
        plain = folded(model, read, {one.name: one.tensors for one in found if one.tensors})
        plain.save_pretrained(folder)
        notes = _notes(read, found)
        if not copy_besides(base, folder, hub):
            notes.append(NO_TOKENIZER)
        title = f"A model with {len(read.tasks)} task{'s' if len(read.tasks) > 1 else ''} folded in"
        usage = _USAGE.format(kind=type(plain).__name__)
        write_card(folder, title, read, base.name, usage, notes, library_name="transformers")
    return Export(output, notes, {one.name: one.loss for one in found if one.loss})


@dataclass(frozen=True)
class _Chosen:
    """The projector of the exported model; no tensors if it is the base model's."""

    name: str
    tensors: Mapping[str, Tensor]
    what: str
    loss: dict[str, float]


def _chosen(bench: ProjectorBench, adapter: Adapter, task_name: str | None) -> _Chosen:
    if adapter.averaged_projectors:  # the tasks' own are not known
        return _Chosen(bench.name, bench.mean(), "the mean that the merge has", {})
    if task_name is not None:
        task = next(task for task in adapter.tasks if task.name == task_name)
        tensors = task.projectors.get(bench.name, {})
        return _Chosen(bench.name, tensors, f"that of '{task_name}'", bench.loss(tensors))
    if len(adapter.tasks) == 1:
        return _Chosen(bench.name, bench.mean(), "the adapter's", bench.loss(bench.mean()))
    fitted = bench.fitted()
    if fitted is not None:
        return _Chosen(bench.name, fitted, "the least-squares fit to the tasks'", bench.loss(fitted))
    why = "no way to run it on image means, or no spread of the images"
    return _Chosen(
        bench.name, bench.mean(), f"the mean of the tasks' by their weights ({why})", bench.loss(bench.mean())
    )


def _check_task(adapter: Adapter, task_name: str | None) -> None:
    names = [task.name for task in adapter.tasks]
    if task_name is not None and task_name not in names:
        raise ValueError(f"`projector` names the task '{task_name}', but the tasks are {', '.join(map(repr, names))}.")
    if any(task.name == task_name and task.origin.projectors_left_out for task in adapter.tasks):
        raise ValueError(f"'{task_name}' had the weight 0 in this merge, so its projector was not kept.")
    mean = next((name for name, tasks in adapter.averaged_projectors.items() if len(tasks) > 1), None)
    if task_name is not None and mean is not None:
        raise ValueError(f"The projector '{mean}' is the mean of several tasks' already; leave `projector` out.")


def _notes(adapter: Adapter, projectors: Sequence[_Chosen]) -> list[str]:
    notes = []
    if adapter.is_gated:
        notes.append(GATE_LOST)
    for one in projectors:
        if len(adapter.tasks) > 1 and one.loss:
            shares = ", ".join(f"{task} {share:.0%}" for task, share in one.loss.items())
            notes.append(
                f"The projector '{one.name}' is {one.what}; it is not routed any more. Lost of what training changed "
                f"in each task's own, on means of images like the task's (100 %: as far off as the base model's): "
                f"{shares}. On patches, which vary more, more is lost; {_SEEN}. Text is not affected."
            )
    return notes or ["Outputs are the adapter's, up to rounding."]
