"""What every export has in common: what is read, the folder that is written, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn

from ..files.adapter import Adapter
from ..files.card import CARD_NAME
from ..files.key_layouts import with_current_names
from ..files.stored_delta import KEY_PREFIX
from ..version import __version__


@dataclass(frozen=True)
class Export:
    """What was exported.

    Args:
        folder (`Path`): Where it is.
        notes (`list[str]`): What it cannot do that the adapter could; the folder's `README.md` says so too.
        projector_loss (`dict[str, dict[str, float]]`):
            By projector and task, how far the one projector of a folded model is from the task's own, as a share of
            how far training moved that: 0 is the task's own, 1 as far from it as the base model's.
    """

    folder: Path
    notes: list[str]
    projector_loss: dict[str, dict[str, float]] = field(default_factory=dict)


def with_names_of(adapter: Adapter, model: nn.Module | None) -> Adapter:
    """The adapter with its layers called as in the model, or, without one, as transformers calls them today.

    Raises:
        UnmergeableAdapterError: A layer or projector matches no module of the model.
    """
    (named,) = with_current_names([adapter], model)
    names = {
        old: new
        for before, after in zip(adapter.tasks, named.tasks)
        for old, new in zip(before.deltas, after.deltas, strict=True)
    }
    return replace(named, pairs={names[module]: pair for module, pair in adapter.pairs.items()})


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
    for module in sorted(adapter.pairs):
        pair = adapter.pairs[module]
        dtype = adapter.files[0].dtype(f"{KEY_PREFIX}{pair.module}.lora_A.weight")
        delta = pair.read()
        found[module] = (delta.A.to(dtype), delta.B.to(dtype))
    return found


def write_card(
    folder: Path, title: str, adapter: Adapter, base_model: str | None, usage: str, notes: Sequence[str], **data: Any
) -> None:
    """Write the model card of an export."""
    # A folder of the user's own is nobody else's business, and no model that the Hub could link to.
    known = base_model if base_model is not None and not Path(base_model).exists() else None
    about = ModelCardData(base_model=known, tags=["continual-learning", "lora", "merge", "peft-many"], **data)
    rows = "\n".join(
        f"| {task.name} | {task.origin.source} | {task.origin.revision or ''} | {task.weight:g} |"
        for task in adapter.tasks
    )
    said = "\n".join(f"- {note}" for note in notes)
    text = (
        f"# {title}\n\nExported by `peft_many` {__version__} "
        "(MAny, arXiv 2604.14016).\n\n"
        f"```python\n{usage}```\n\n{said}\n\n| task | source | revision | weight |\n|---|---|---|---|\n{rows}\n"
    )
    ModelCard(f"---\n{about.to_yaml()}\n---\n\n{text}").save(folder / CARD_NAME)
