"""A plain LoRA of the language model: what vLLM, SGLang, llama.cpp and stock PEFT load without this package."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from typing_extensions import Unpack

from ..algebra.precision import without_autocast
from ..files.adapter import Adapter, TaskAdapter, read_adapter
from ..files.card import plain
from ..files.card_usage import class_of, quoted
from ..files.errors import UnmergeableAdapterError
from ..files.older_names import with_current_names
from ..files.source import write_adapter
from ..hub.base_model import BaseModel
from ..hub.sources import HubArguments, find_adapter
from ..merging.arguments import output_folder
from ..merging.prepare import AdapterPath
from ..records import TASKS_NAME
from ..records.values import one_of
from .export import (
    Export,
    as_lora,
    export_folder,
    notes_on_gate,
    public_model,
    read_pairs,
    write_card,
)
from .served import SERVERS, as_served

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for `max_lora_rank`

_USAGE = """```python
from peft import PeftModel
from transformers import {kind}

base = {kind}.from_pretrained({base})
model = PeftModel.from_pretrained(base, ".")  # this folder, or its id on the Hub
```

```bash
vllm serve {base_model} --enable-lora --max-lora-rank {rank} --lora-modules merged=.{routed}
```"""
_ROUTED = """ \\
    --additional-config '{"peft_many": "MERGE"}'  # what this was exported from, for vLLM with peft_many installed"""


@without_autocast()
def export_lora(
    adapter: AdapterPath,
    output_dir: str | os.PathLike[str],
    *,
    with_tasks: bool = False,
    check_for: str | None = None,
    base_model: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    **hub: Unpack[HubArguments],
) -> Export:
    """Write a merge or an adapter as a plain PEFT LoRA, which loads without this package.

    Every layer has the same rank, that of the largest (smaller ones are filled up with zeros), and a scaling of one:
    some servers, such as llama.cpp, know one rank for all. vLLM has to be told the next of 8, 16, 32, 64, 128, 256,
    320 and 512, which the notes name. No base model is read; the LoRA is in memory, whole.

    On text the outputs are those of the adapter. The projectors stay behind: images are seen through the base model's.

    Args:
        adapter (`str`): The folder or Hub id of a merge, or of one task's adapter.
        output_dir (`str`): The folder to create; it must not exist, or be empty.
        with_tasks (`bool`, defaults to `False`):
            Write the LoRAs of a merge's tasks too, in the folders `task_0`, `task_1` and so on within, in the order of
            its tasks: what a server chooses among to do as `gate_lora` does (`peft_many.serving.gate`). `tasks.json`
            says whose they are.
        check_for (`str`, *optional*):
            `"vllm"` makes sure that each of its layers is one of the base model's language model, by the base model's
            config alone: vLLM leaves out others without a word. It gets the names that transformers has today, and
            each layer keeps its own rank.
        base_model (`str`, *optional*): For that: a folder or Hub id, if the adapter does not say it.
        dry_run (`bool`, defaults to `False`): Check all that can be checked, and write nothing.
        **hub: `token`, `cache_dir` and `local_files_only`, as in [`~huggingface_hub.snapshot_download`].

    Returns:
        [`Export`]: The folder, and what is lost.

    Raises:
        ValueError: `with_tasks` is asked for, and it is no merge; or there is no base model to check it for.
        UnmergeableAdapterError: It is no additive LoRA, a rank is above 512, or a layer would not be served.
        AdapterNotFoundError, StatisticsError, FileExistsError: As in [`merge_adapter_files`].

    Example:

        ```py
        >>> from peft_many import export_lora

        >>> # then: vllm serve … --enable-lora --lora-modules merged=lora
        >>> export_lora("merged", "lora").notes[0]
        'All layers have rank 8 (vLLM: `--max-lora-rank 8`), in float32.'
        ```
    """
    output = output_folder(output_dir, [adapter, base_model])
    source = find_adapter(adapter, **hub)
    (read,) = with_current_names([read_adapter(source)], None)
    if with_tasks and read.merge is None:
        raise ValueError(f"{source.name} is no merge, so there are no tasks' LoRAs beside it (`with_tasks`).")
    if check_for is not None:
        one_of("check_for", check_for, SERVERS)
        read = as_served(read, BaseModel.of(base_model, read.config, hub))
    told = {
        name: getattr(read.config, name)
        for name in ("task_type", "auto_mapping", "base_model_name_or_path", "revision")
    }
    shape: Mapping[str, Any] = {**told, "pad": check_for is None}
    config, tensors = as_lora(read, read_pairs(read), LoraConfig, **shape)
    served = _served_rank(source.name, config.r, read.tasks if with_tasks else [])
    stored = next(iter(tensors.values())).dtype
    dtype = str(stored).removeprefix("torch.")
    ranks = "Layers have ranks up to" if config.rank_pattern else "All layers have rank"
    notes = [f"{ranks} {config.r} (vLLM: `--max-lora-rank {served}`), in {dtype}."]
    notes += [*_left_behind(read), *(_beside(read) if with_tasks else notes_on_gate(read))]
    with export_folder(output, dry_run) as folder:
        if not dry_run:
            write_adapter(folder, config, tensors)
        if with_tasks and not dry_run:
            _write_tasks(folder, read, stored, shape)
        base = config.base_model_name_or_path
        usage = _USAGE.format(
            kind=class_of(read.config),
            base=quoted(base) if public_model(base) else "...",
            base_model=shlex.quote(base) if public_model(base) else "BASE_MODEL",
            rank=served,
            routed=_ROUTED if read.merge is not None and read.merge.is_routed else "",
        )
        write_card(folder, "A LoRA of {tasks}", read, base, usage, notes, library_name="peft")
    return Export(output, notes)


def _served_rank(name: str, rank: int, tasks: Sequence[TaskAdapter]) -> int:
    """The `max_lora_rank` that vLLM has to be told, for an adapter and the tasks that are exported beside it."""
    most = SERVED_RANKS[-1]
    if rank > most:
        raise UnmergeableAdapterError(
            f"{name} has layers of rank {rank}, and vLLM serves at most {most}: merge it again with `rank={most}` or "
            "less."
        )
    of_tasks = {task.name: max((delta.rank for delta in task.deltas.values()), default=0) for task in tasks}
    large = next((task for task, its in of_tasks.items() if its > most), None)
    if large is not None:
        raise UnmergeableAdapterError(
            f"The task '{large}' of {name} has layers of rank {of_tasks[large]}, and vLLM serves at most {most}: "
            "export it without the tasks' own LoRAs (`with_tasks`)."
        )
    return next(served for served in SERVED_RANKS if served >= max([rank, *of_tasks.values()]))


def _left_behind(read: Adapter) -> Iterator[str]:
    """What an adapter has that its LoRA has not."""
    if any(task.projectors for task in read.tasks):
        kept = "`export_model` (`--format model`) keeps the projector."
        if read.merge is not None and read.merge.routing:
            kept = (
                "`export_routed_model` (`--format routed`) keeps the projectors, and vLLM with peft_many installed "
                "takes them from the merge (`--additional-config`)."
            )
        yield (
            "The tasks' projectors are not exported. Answers on text are the adapter's; images go through the base "
            "model's projector, with which the tasks were not trained: expect most answers about images to be "
            f"wrong. {kept}"
        )
    beside = sorted({name for task in read.tasks for name in task.base_tensors})
    if beside:
        yield (
            f"'{beside[0]}', saved with the adapter but not trained, is not exported: if the vocabulary was resized, "
            "save the base model with it."
        )


def _beside(read: Adapter) -> Iterator[str]:
    names = ", ".join(f"{plain(task.name)} (`task_{t}`)" for t, task in enumerate(read.tasks))
    yield f"The tasks' own LoRAs are in folders of their own: {names}."


def _write_tasks(folder: Path, adapter: Adapter, dtype: torch.dtype, shape: Mapping[str, Any]) -> None:
    """The LoRAs of a merge's tasks, each in a folder of its own, and whose they are."""
    assert adapter.merge is not None
    identities = json.dumps(adapter.merge.identities, indent=2, ensure_ascii=False)
    (folder / TASKS_NAME).write_text(f"{identities}\n", encoding="utf-8")
    for t, task in enumerate(adapter.tasks):
        read = {module: delta.read() for module, delta in sorted(task.deltas.items())}
        pairs = {module: (delta.A.to(dtype), delta.B.to(dtype)) for module, delta in read.items()}
        (folder / f"task_{t}").mkdir()
        write_adapter(folder / f"task_{t}", *as_lora(adapter, pairs, LoraConfig, **shape))
