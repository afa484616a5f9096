"""The part of an adapter's model card (`README.md`) that says what it is, where it comes from and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from ..version import __version__
from .atomic import replace_file

if TYPE_CHECKING:  # which writes cards
    from ..tuner.config import MAnyConfig

CARD_NAME = "README.md"
_BEGIN, _END = "<!-- peft_many -->", "<!-- /peft_many -->"
_PLUGIN = "`peft_many` (MAny, arXiv 2604.14016)"
_LARGEST_CARD = 1 << 20  # bytes that are read of somebody else's card


def update_card(folder: Path, config: MAnyConfig, repo_id: str | None = None, subfolder: str | None = None) -> None:
    """Put our part at the top of the folder's model card, or renew it there; all else in the card stays.

    Without `import peft_many` PEFT cannot load the adapter, so its card must say so.

    Args:
        folder (`Path`): The adapter's folder, with a `README.md` or without.
        config ([`MAnyConfig`]): The adapter's.
        repo_id (`str`, *optional*): Where on the Hub it goes, for the example; without it the example is of a folder.
        subfolder (`str`, *optional*): Where in the repository.
    """
    path = folder / CARD_NAME
    card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    data: Any = card.data
    if path.is_file() and data.library_name != "peft":
        return  # somebody's README, not an adapter's card
    data.library_name = "peft"
    data.base_model = config.base_model_name_or_path or data.base_model
    if data.base_model:
        data.base_model_relation = "adapter"
    if config.projector_modules:
        data.pipeline_tag = data.pipeline_tag or "image-text-to-text"
    found = [*_listed(data.datasets), *(name for task in config.tasks or [] for name in task.get("datasets", []))]
    if found:
        data.datasets = sorted(set(found))
    tags = {"lora", "peft-many", "continual-learning", *(["merge"] if config.is_merge else [])}
    data.tags = sorted(tags.union(data.tags or []))
    rest = re.sub(f"{_BEGIN}.*?{_END}", "", card.text, flags=re.DOTALL).strip()
    about = _about_merge(config) if config.is_merge else _about_task(config)
    parts = [_BEGIN, about, _usage(config, repo_id, subfolder), f"Saved by peft_many {__version__}.", _END]
    card.text = "\n\n".join(parts) + f"\n\n{rest}\n"
    with replace_file(path) as temporary:
        card.save(temporary)


def data_sets_of(folder: Path) -> list[str]:
    """The data sets that the metadata of an adapter's card names; none if there is no card that can be read."""
    path = folder / CARD_NAME
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_CARD:
            return []
        # A file that anybody may have written; of its metadata only names that the Hub would take are used.
        named = _listed((metadata_load(path) or {}).get("datasets"))
    except (OSError, RecursionError, ValueError, yaml.YAMLError):
        return []
    return sorted({name for name in named if isinstance(name, str) and _is_repo_id(name)})


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


# --- What it is ------------------------------------------------------------------------------------------------------


def _about_task(config: MAnyConfig) -> str:
    task = f" for the task “{_plain(config.task_name)}”" if config.task_name else ""
    about = f"# A task adapter{task}\n\nTrained with {_PLUGIN}, to be merged with others of its kind."
    measured = getattr(config.statistics, "tasks", ())
    if measured:
        samples, images = (sum(getattr(task, of) for task in measured) for of in ("samples", "images"))
        about += f" Its statistics were measured on {samples} samples with {images} images."
    return about + _pooled(config.pooled or []) + _history(config.operations or [])


def _about_merge(config: MAnyConfig) -> str:
    tasks = config.tasks or []
    projectors = "averaged" if config.averaged_projectors else "routed per image by visual prototypes"
    gated = ", chosen among by each row's images" if config.gate_lora else ""
    parts = [
        f"# A merge of {len(tasks)} task adapters",
        f"Merged with {_PLUGIN}: language-model LoRAs by {_how(config.method)}{gated}"
        + (f", projectors {projectors}." if config.projector_modules else "."),
        _table_of(tasks),
    ]
    if any("interference" in task for task in tasks):
        parts.append(
            "Interference is what merging is expected to cost a task, before any evaluation: the share of its LoRA's "
            "outputs on its own inputs that the merged LoRA changes, `‖(ΔW* − ΔW_t) C_t^½‖ / ‖ΔW_t C_t^½‖`, the mean "
            "over layers. 0 is as if alone, 1 as if the task's LoRA were lost. Compare merges of "
            "the same tasks by it, not tasks."
        )
    return (
        "\n\n".join(parts)
        + _pooled([inner for task in tasks for inner in task.get("pooled") or []])
        + _history(config.operations or [])
    )


def _table_of(tasks: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "task": lambda task: task["name"],
        "source": lambda task: task.get("source"),
        "revision": lambda task: task.get("revision"),
        "adapter": lambda task: _options(task.get("options") or {}),
        "weight": lambda task: f"{task['weight']:g}",
        "samples": lambda task: str(task.get("samples", "")),
        "images": lambda task: str(task.get("images", "")),
        "interference": lambda task: f"{task['interference']:.3f}" if "interference" in task else "",
        "sha256": lambda task: task["sha256"][:12],
    }
    rows = [[_plain(cell(task)) for cell in columns.values()] for task in tasks]
    told = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line[place] for place in told)} |" for line in lines)


def _pooled(tasks: Sequence[Mapping[str, Any]]) -> str:
    if not tasks:
        return ""
    lines = [f"- {_plain(task.get('name'))}, from {_plain(task.get('source'))}" for task in tasks]
    return "\n\nPooled tasks, which can be neither forgotten nor weighted one by one:\n\n" + "\n".join(lines)


def _history(operations: Iterable[Mapping[str, Any]]) -> str:
    """What was done, a line for each operation."""
    lines = [
        f"1. {_plain(in_words(line))} ({_plain(_options(line['options']))}; peft_many {_plain(line['peft_many'])})"
        for line in operations
    ]
    return "\n\nWhat was done, in this order:\n\n" + "\n".join(lines) if lines else ""


def in_words(operation: Mapping[str, Any]) -> str:
    """One operation of those that a config records, and its tasks; as somebody wrote them, not escaped."""
    forgotten = operation.get("forgotten", 0)
    tasks = [*operation["tasks"], *([f"{forgotten} since forgotten"] if forgotten else [])]
    return f"{operation['operation']}: {', '.join(tasks)}"


def _options(options: Mapping[str, Any]) -> str:
    # Sorted, as JSON keeps them: a card must not depend on whether its config was read from a file.
    return ", ".join(f"{name} {value}" for name, value in sorted(options.items()) if value not in (None, False))


def _plain(text: str | None) -> str:
    """A name that an adapter brought along, as text that is no Markdown or HTML of the card's."""
    return re.sub(r"([\\`|<>\[\]])", r"\\\1", " ".join((text or "").split()))


def _how(method: Mapping[str, Any] | None) -> str:
    if method is None:
        return "least squares on input covariances"
    options = ", ".join(f"{name}={value!r}" for name, value in method["options"].items())
    return f"`{method['name']}({options})` ({method['source']})"


# --- How to load it --------------------------------------------------------------------------------------------------


def _usage(config: MAnyConfig, repo_id: str | None, subfolder: str | None) -> str:
    kind = _class_of(config)
    base = config.base_model_name_or_path
    within = f", subfolder={_quoted(subfolder)}" if subfolder else ""
    where = f"{_quoted(repo_id)}{within})" if repo_id else '".")  # this folder, or its id on the Hub'
    lines = [
        "import peft_many  # pip install peft-many; registers the adapter type MANY",
        "from peft import PeftModel",
        *([f"from transformers import {kind}"] if base else []),
        "",
        f"base = {kind}.from_pretrained({_quoted(base)})" if base else "base = ...  # what the adapter was trained on",
        f"model = PeftModel.from_pretrained(base, {where}",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _quoted(text: str) -> str:
    """As a Python string, without what could end our part of the card."""
    return json.dumps(text).replace("<", r"\u003c")


def _class_of(config: MAnyConfig) -> str:
    """The class to load the base model with: the one that PEFT noted down, or the auto class of its kind."""
    noted = config.auto_mapping or {}
    name, library = noted.get("base_model_class"), str(noted.get("parent_library"))
    # Names in a downloaded config are not to become code in a card that people copy from.
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) and library.startswith("transformers."):
        return name
    return "AutoModelForImageTextToText" if config.projector_modules else "AutoModelForCausalLM"
