"""The part of an adapter's model card (`README.md`) that says what it is and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .atomic import replace_file

CARD_NAME = "README.md"
_BEGIN, _END = "<!-- peft_many -->", "<!-- /peft_many -->"

_USAGE = """
```python
import peft_many  # pip install peft-many; registers the adapter type MANY
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this/adapter")
```
"""


def update_card(
    folder: Path,
    base_model: str | None,
    task_name: str | None,
    tasks: Sequence[Mapping[str, Any]] | None,
    method: Mapping[str, Any] | None = None,
    averaged: bool = False,
) -> None:
    """Put our part at the top of the folder's model card, or renew it there; all else in the card stays.

    Without `import peft_many` PEFT cannot load the adapter, so its card must say so.

    Args:
        folder (`Path`): The adapter's folder, with a `README.md` or without.
        base_model (`str`, *optional*): The base model's name.
        task_name (`str`, *optional*): The task's name.
        tasks (`Sequence[Mapping[str, Any]]`, *optional*): Of a merge, what its config says of its tasks.
        method (`Mapping[str, Any]`, *optional*): Of a merge by another method than LPM, what its config says of it.
        averaged (`bool`): Whether the projectors of a merge are averaged.
    """
    path = folder / CARD_NAME
    card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    data: Any = card.data
    if path.is_file() and data.library_name != "peft":
        return  # somebody's README, not an adapter's card
    data.library_name = "peft"
    data.base_model = base_model or data.base_model
    tags = {"lora", "peft-many", "continual-learning", *(["merge"] if tasks is not None else [])}
    data.tags = sorted(tags.union(data.tags or []))
    rest = re.sub(f"{_BEGIN}.*?{_END}", "", card.text, flags=re.DOTALL).strip()
    card.text = f"{_BEGIN}\n{_about(task_name, tasks, method, averaged)}{_USAGE}{_END}\n\n{rest}\n"
    with replace_file(path) as temporary:
        card.save(temporary)


def _about(
    task_name: str | None,
    tasks: Sequence[Mapping[str, Any]] | None,
    method: Mapping[str, Any] | None,
    averaged: bool,
) -> str:
    plugin = "[peft_many](https://pypi.org/project/peft-many) (MAny, arXiv 2604.14016)"
    if tasks is None:
        task = f" for the task “{_plain(task_name)}”" if task_name else ""
        return f"# A task adapter{task}\n\nTrained with {plugin}, to be merged with others of its kind.\n"
    cells = [(t["name"], t["source"], t["revision"], f"{t['weight']:g}", t["sha256"][:12]) for t in tasks]
    rows = "\n".join(f"| {' | '.join(map(_plain, row))} |" for row in cells)
    return (
        f"# A merge of {len(cells)} task adapters\n\nMerged with {plugin}: language-model LoRAs by {_how(method)}, "
        f"projectors {'averaged' if averaged else 'routed per image by visual prototypes'}.\n\n"
        f"| task | source | revision | weight | sha256 |\n|---|---|---|---|---|\n{rows}\n"
    )


def _plain(text: str | None) -> str:
    """A name that an adapter brought along, as text that is no Markdown or HTML of the card's."""
    return re.sub(r"([\\`|<>\[\]])", r"\\\1", " ".join((text or "").split()))


def _how(method: Mapping[str, Any] | None) -> str:
    if method is None:
        return "least squares on input covariances"
    options = ", ".join(f"{name}={value!r}" for name, value in method["options"].items())
    return f"`{method['name']}({options})` ({method['source']})"
