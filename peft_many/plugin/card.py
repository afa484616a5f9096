"""The part of an adapter's model card (`README.md`) that says what it is and how to load it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from .atomic import replace_file

if TYPE_CHECKING:
    from .config import MAnyConfig

_BEGIN, _END = "<!-- peft_many -->", "<!-- /peft_many -->"

_USAGE = """
```python
import peft_many  # pip install peft-many; registers the adapter type MANY
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this/adapter")
```
"""


def update_card(config: MAnyConfig, folder: Path) -> None:
    """Put our part at the top of the folder's model card, or renew it there; all else in the card stays.

    Without `import peft_many` PEFT cannot load the adapter, so its card must say so.
    """
    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    data: Any = card.data
    data.library_name = "peft"
    data.base_model = config.base_model_name_or_path or data.base_model
    tags = {"lora", "peft-many", "continual-learning", *(["merge"] if config.is_merge else [])}
    data.tags = sorted(tags.union(data.tags or []))
    rest = re.sub(f"{_BEGIN}.*?{_END}", "", card.text, flags=re.DOTALL).strip()
    card.text = f"{_BEGIN}\n{_about(config)}{_USAGE}{_END}\n\n{rest}\n"
    with replace_file(path) as temporary:
        card.save(temporary)


def _about(config: MAnyConfig) -> str:
    plugin = "[peft_many](https://pypi.org/project/peft-many) (MAny, arXiv 2604.14016)"
    if config.tasks is None:
        task = f" for the task “{config.task_name}”" if config.task_name else ""
        return f"# A task adapter{task}\n\nTrained with {plugin}, to be merged with others of its kind.\n"
    cells = [(t["name"], t["source"], t["revision"] or "", f"{t['weight']:g}", t["sha256"][:12]) for t in config.tasks]
    rows = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return (
        f"# A merge of {len(cells)} task adapters\n\nMerged with {plugin}: language-model LoRAs by least squares on "
        "input covariances, projectors routed per image by visual prototypes.\n\n"
        f"| task | source | revision | weight | sha256 |\n|---|---|---|---|---|\n{rows}\n"
    )
