"""How an adapter is loaded and what can be done with it then, as its model card says it."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any, Protocol

from ..records import MergeRecord, merge_of

_GOING_ON = """Tasks can be added to it and forgotten, without the adapters that it was made of:

```bash
peft-many add . me/new-task --output with-new-task
peft-many remove . TASK --output without-task
```

vLLM serves it{beside}; the export says which rank it takes:

```bash
peft-many export . --format lora --check-for vllm --output lora
vllm serve {base} --enable-lora --max-lora-rank RANK --lora-modules merged=lora{told}
```"""
_TOLD = """ \\
    --additional-config '{"peft_many": "."}'"""


class Described(Protocol):
    """What a card tells of a config: that of a task's adapter or of a merge.

    Those of type MANY have `task_name`, `projector_modules` and `pool` too.
    """

    base_model_name_or_path: str | None
    auto_mapping: dict[str, Any] | None
    statistics: Any


def going_on(config: Described, merge: MergeRecord) -> str:
    """What can be done with a merge besides loading it."""
    routed = merge.is_routed
    base = config.base_model_name_or_path or ""
    return _GOING_ON.format(
        # A name in a downloaded config could end the block.
        base=shlex.quote(base) if re.fullmatch(r"[\w./~ -]+", base) else "BASE_MODEL",
        beside=", with `peft_many` beside it" if routed else "",
        told=_TOLD if routed else "",
    )


def usage(config: Described, repo_id: str | None, subfolder: str | None) -> str:
    """How to load an adapter, from a repository of the Hub or from its folder."""
    kind = class_of(config)
    base = config.base_model_name_or_path
    within = f", subfolder={quoted(subfolder)}" if subfolder else ""
    where = f"{quoted(repo_id)}{within})" if repo_id else '".")  # this folder, or its id on the Hub'
    lines = [
        *(["import peft_many  # pip install peft-many; registers the adapter type MANY"] if is_ours(config) else []),
        "from peft import PeftModel",
        *([f"from transformers import {kind}"] if base else []),
        "",
        f"base = {kind}.from_pretrained({quoted(base)})" if base else "base = ...  # what the adapter was trained on",
        f"model = PeftModel.from_pretrained(base, {where}",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def quoted(text: str) -> str:
    """As a Python string, without what could end our part of the card."""
    return json.dumps(text).replace("<", r"\u003c")


def class_of(config: Any) -> str:
    """The class to load the base model with: the one that PEFT noted down, or the auto class of its kind."""
    noted = config.auto_mapping or {}
    name, library = noted.get("base_model_class"), str(noted.get("parent_library"))
    # Names in a downloaded config are not to become code in a card that people copy from.
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) and library.startswith("transformers."):
        return name
    return "AutoModelForImageTextToText" if sees(config) else "AutoModelForCausalLM"


def is_ours(config: Any) -> bool:
    """Whether its type is MANY, which PEFT does not know without this package."""
    return hasattr(config, "projector_modules")


def sees(config: Any) -> bool:
    """Whether the adapter is one of a model that takes images, as far as it and its statistics tell."""
    measured = getattr(config.statistics, "tasks", ()) if hasattr(config, "statistics") else ()
    merge = merge_of(config)
    return (
        bool(getattr(config, "projector_modules", None))
        or any(task.projectors for task in measured)
        or (merge is not None and any(task.images for task in merge.tasks))
    )
