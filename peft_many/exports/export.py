"""What every export has in common: the tensors that it reads, the folder that it becomes, the card that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from ..files.adapter import Adapter
from ..files.card import CARD_NAME, plain
from ..files.stored_delta import KEY_PREFIX
from ..version import __version__


@dataclass(frozen=True)
class Export:
    """What was exported.

    Args:
        folder (`Path`): Where it is.
        notes (`list[str]`): What it cannot do that the adapter could; the folder's `README.md` says so too.
    """

    folder: Path
    notes: list[str]


def read_pairs(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """`A`, with the LoRA scaling folded in, and `B` of every layer, in the dtype that they are stored in.

    Adapters of other PEFT methods store none; theirs are factors of the delta, float32.

    Raises:
        UnmergeableAdapterError: They hold NaN or Inf.
    """
    if not adapter.pairs:
        read = {module: delta.read() for module, delta in sorted(adapter.tasks[0].deltas.items())}
        return {module: (delta.A, delta.B) for module, delta in read.items()}
    found = {}
    for module, pair in sorted(adapter.pairs.items()):
        dtype = pair.weights.dtype(f"{KEY_PREFIX}{pair.module}.lora_A.weight")
        delta = pair.read()
        found[module] = (delta.A.to(dtype), delta.B.to(dtype))
    return found


def notes_on_gate(adapter: Adapter) -> list[str]:
    """What no export can keep of a merge with `gate_lora`."""
    if adapter.is_gated:
        return ["It has the merged LoRA for all inputs; images choose no task's own any more (`gate_lora`)."]
    return []


def write_card(
    folder: Path, title: str, adapter: Adapter, base_model: str | None, usage: str, notes: Sequence[str], **data: Any
) -> None:
    """Write the model card of an export.

    Args:
        folder (`Path`): The export.
        title (`str`): What it is; `{tasks}` in it becomes "3 tasks".
        adapter ([`Adapter`]): What was exported.
        base_model (`str`, *optional*): Folder or Hub id.
        usage (`str`): Python that loads it.
        notes (`Sequence[str]`): Those of [`Export`].
        **data (`Any`): Of the card's metadata.
    """
    # A folder of the user's own is nobody else's business, and no model that the Hub could link to.
    known = base_model if base_model is not None and not Path(base_model).exists() else None
    about = ModelCardData(base_model=known, tags=["continual-learning", "lora", "merge", "peft-many"], **data)
    tasks = "1 task" if len(adapter.tasks) == 1 else f"{len(adapter.tasks)} tasks"
    rows = "\n".join(
        f"| {plain(task.name)} | {plain(task.origin.source)} | {plain(task.origin.revision)} | {task.weight:g} |"
        for task in adapter.tasks
    )
    said = "\n".join(f"- {note}" for note in notes)
    text = (
        f"# {title.format(tasks=tasks)}\n\nExported by `peft_many` {__version__} (MAny, arXiv 2604.14016).\n\n"
        f"```python\n{usage}```\n\n{said}\n\n| task | source | revision | weight |\n|---|---|---|---|\n{rows}\n"
    )
    ModelCard(f"---\n{about.to_yaml()}\n---\n\n{text}").save(folder / CARD_NAME)
