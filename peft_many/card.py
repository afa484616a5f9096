"""The model card of a merged adapter folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .plugin.config import MAnyConfig


def write_card(config: MAnyConfig, folder: Path) -> None:
    """Write `README.md`: what was merged, and how to load it."""
    tasks = config.tasks or []
    base = config.base_model_name_or_path
    data = ModelCardData(
        library_name="peft",
        base_model=base,
        base_model_relation="adapter",
        tags=["lora", "merge", "continual-learning", "peft-many"],
    )
    cells = [(t["name"], t["source"], t["revision"] or "", f"{t['weight']:g}", f"`{t['sha256'][:12]}`") for t in tasks]
    rows = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    text = f"""
# A merge of {len(tasks)} task adapters

Merged with [peft_many](https://pypi.org/project/peft-many) (MAny, arXiv 2604.14016): language-model LoRAs by least
squares on input covariances, projectors routed per image by visual prototypes.

| task | source | revision | weight | sha256 |
|---|---|---|---|---|
{rows}

```python
import peft_many  # registers the adapter type MANY
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/id/of/this/adapter")
```
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder / "README.md")
