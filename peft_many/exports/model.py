"""A full transformers model: the deltas folded into the weights, and one fixed projector, which is not routed."""

from __future__ import annotations

import os

from typing_extensions import Unpack

from ..algebra.precision import without_autocast
from ..files.adapter import Adapter, read_adapter
from ..files.older_names import with_current_names
from ..hub.base_model import BaseModel
from ..hub.sources import HubArguments, find_adapter
from ..merging.arguments import output_folder
from ..merging.mean_projectors import average_projectors
from ..merging.prepare import AdapterPath
from ..records.words import quoted
from .base_model import fold, put_projector
from .export import Export, export_folder, notes_on_gate, write_card

_USAGE = """```python
from transformers import {kind}

model = {kind}.from_pretrained(".")  # this folder, or its id on the Hub
```"""


@without_autocast()
def export_model(
    adapter: AdapterPath,
    output_dir: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    projector: str | None = None,
    dry_run: bool = False,
    **hub: Unpack[HubArguments],
) -> Export:
    """Fold a merge or an adapter into its base model and write a full model, which loads without this package.

    On text the outputs are those of the adapter, up to the rounding of the base model's dtype. On images most is lost:
    a plain model has one projector, which cannot be the routed mixture. It is the mean of the tasks' projectors by
    their weights, or that of one task. On the tiny LLaVA of Mini-UCIT the mean answers 19 % rightly and one task's own
    18 to 20 % (that task as ever), where routing answers 70 %: if images matter, use [`export_routed_model`].

    The whole base model is loaded into memory, on the CPU and in the dtype that it is stored in.

    Args:
        adapter (`str`): The folder or Hub id of a merge, or of one task's adapter.
        output_dir (`str`): The folder to create; it must not exist, or be empty.
        base_model (`str`, *optional*): Folder or Hub id (`"me/model@revision"`), if the adapter does not say it.
        projector (`str`, *optional*):
            The task whose projector is kept in place of the mean. Of averaged projectors there is only the mean.
        dry_run (`bool`, defaults to `False`):
            Check all that can be checked without the base model's weights, and write nothing.
        **hub: `token`, `cache_dir` and `local_files_only`, as in [`~huggingface_hub.snapshot_download`].

    Returns:
        [`Export`]: The folder, and what is lost.

    Raises:
        ValueError: There is no such task, or nobody says which the base model is.
        UnmergeableAdapterError: The adapter is damaged, or does not fit the base model.
        FileNotFoundError, FileExistsError, StatisticsError: As in [`merge_adapter_files`].

    Example:

        ```py
        >>> from peft_many import export_model

        >>> exported = export_model("merged", "model", base_model="base", projector="clevr")
        >>> exported.notes[0]
        "The projector 'model.multi_modal_projector' is that of 'clevr' and is ...
        ```
    """
    output = output_folder(output_dir, [adapter, base_model])
    read = read_adapter(find_adapter(adapter, **hub))
    _check_task(read, projector)
    base = BaseModel.of(base_model, read.config, hub)
    with export_folder(output, dry_run) as folder:
        model = base.empty() if dry_run else base.load()
        (read,) = with_current_names([read], model)
        plain = fold(model, read)
        chosen = [task for task in read.tasks if projector in (None, task.name)]
        averaged, tensors = average_projectors(chosen)
        for name in averaged:
            put_projector(plain, name, tensors)
        if not dry_run:
            plain.save_pretrained(folder)
        notes = [*notes_on_gate(read), *_notes_on_projectors(read, projector)]
        notes = (notes or ["Outputs are the adapter's, up to rounding."]) + base.copy_tokenizer(folder)
        usage = _USAGE.format(kind=type(plain).__name__)
        title = "A model with {tasks} folded in"
        write_card(folder, title, read, base.name, usage, notes, library_name="transformers")
    return Export(output, notes)


def _check_task(adapter: Adapter, task_name: str | None) -> None:
    """A `ValueError` if the projector of that task cannot be kept."""
    if task_name is None:
        return
    task = next((task for task in adapter.tasks if task.name == task_name), None)
    if task is None:
        names = quoted(task.name for task in adapter.tasks)
        raise ValueError(f"There is no task '{task_name}' whose projector could be kept; the tasks are {names}.")
    if task.origin.projectors_left_out:
        raise ValueError(f"'{task_name}' had the weight 0 in this merge, so its projector was not kept.")
    mean = next((name for name, tasks in adapter.averaged_projectors.items() if len(tasks) > 1), None)
    if mean is not None:
        raise ValueError(f"The projector '{mean}' is already the mean of several tasks'; leave out `projector`.")


def _notes_on_projectors(adapter: Adapter, task_name: str | None) -> list[str]:
    """What one projector in place of the routed ones loses; nothing where none was routed."""
    routed = sorted(adapter.merge.routing) if adapter.merge is not None else []
    if len(adapter.tasks) == 1 or not routed:
        return []
    names = " and ".join(f"'{name}'" for name in routed)
    kept, right, lost = "the mean of the tasks' by their weights", "", "images"
    if task_name is not None:
        kept, right, lost = f"that of '{task_name}'", f" and about images of '{task_name}'", "other tasks' images"
    return [
        f"The projector {names} is {kept} and is no longer routed. Answers on text{right} are the merge's; most "
        f"answers about {lost} will be wrong: on the tiny LLaVA of peft_many's Mini-UCIT, right answers about the "
        "images of all tasks fell from 70 % to 19 % with the mean, and to 18 and 20 % with one task's own. "
        "`export_routed_model` (`--format routed`) keeps the routing."
    ]
