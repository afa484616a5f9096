"""The part of an adapter's model card (`README.md`) that says what it is, where it comes from and how to load it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..records import (
    GATES,
    ExpectedRouting,
    MergeOptions,
    MergeRecord,
    Operation,
    PooledTask,
    PoolRecord,
    TaskRecord,
    merge_of,
    most_telling,
)
from ..records.options import BOTH, INSTRUCTIONS
from ..records.words import counted, shortened
from ..version import __version__
from .atomic import replace_file
from .card_usage import Described, going_on, is_ours, sees, usage

CARD_NAME = "README.md"
_BEGIN, _END = "<!-- peft_many -->", "<!-- /peft_many -->"
_PLUGIN = "`peft_many` (MAny, arXiv 2604.14016)"
_MOST_IN_TABLE = 12  # tasks
_LARGEST_CARD = 1 << 20  # bytes that are read of somebody else's card
_UNREADABLE = (OSError, RecursionError, TypeError, ValueError, yaml.YAMLError)


def update_card(folder: Path, config: Described, repo_id: str | None = None, subfolder: str | None = None) -> None:
    """Put our part at the top of the folder's model card, or renew it there; all else in the card stays.

    Without `import peft_many` PEFT cannot load the adapter, so its card must say so. The example in it loads from
    `repo_id` on the Hub, or from a folder if that is not given.
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
    if sees(config) and data.pipeline_tag in (None, "text-generation"):  # which PEFT makes of "CAUSAL_LM"
        data.pipeline_tag = "image-text-to-text"
    tasks = merge.tasks if (merge := merge_of(config)) is not None else []
    found = [*_listed(data.datasets), *(name for task in tasks for name in task.origin.datasets)]
    if found:
        data.datasets = sorted(set(found))
    tags = {"lora", "peft-many", "continual-learning", *(["merge"] if merge is not None else [])}
    data.tags = sorted(tags.union(data.tags or []))
    rest = re.sub(f"{_BEGIN}.*?{_END}", "", card.text, flags=re.DOTALL).strip()
    about = (
        _about_task(config) if merge is None else _about_merge(merge, bool(getattr(config, "projector_modules", None)))
    )
    if rest and (merge is not None or config.statistics is not None) and _is_untouched(rest):
        rest = ""  # what was measured or merged says what it is itself
    further = [] if merge is None else [going_on(config, merge)]
    parts = [_BEGIN, about, usage(config, repo_id, subfolder), *further, f"Saved by peft_many {__version__}.", _END]
    card.text = "\n\n".join(filter(None, [*parts, rest])) + "\n"
    with replace_file(path) as temporary:
        card.save(temporary)


def copy_card(source: Path, folder: Path) -> None:
    """Put a folder's card, if it has one, into another, where what is saved there adds to it.

    One that could not be added to is a `ValueError`: it must show before there is work to lose.
    """
    check_card(source)
    if (source / CARD_NAME).is_file():
        shutil.copyfile(source / CARD_NAME, folder / CARD_NAME)


def check_card(folder: Path) -> None:
    """Refuse a folder whose card nothing can be added to, with a `ValueError`."""
    path = folder / CARD_NAME
    if not path.is_file():
        return
    try:
        if path.stat().st_size > _LARGEST_CARD:
            raise ValueError(f"it is larger than {_LARGEST_CARD >> 20} MiB")
        ModelCard.load(path)
    except _UNREADABLE as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"The model card '{path}', whose text is to be kept, cannot be read: {why}. Correct or remove it."
        ) from error


def _is_untouched(text: str) -> bool:
    """Whether it is the form with nothing filled in that PEFT saves."""
    form = re.sub(r"### Framework versions\s+- PEFT \S+\s*$", "", text)
    return form.strip() == ModelCard.from_template(ModelCardData()).text.strip()


def data_sets_of(folder: Path) -> list[str]:
    """The data sets that the metadata of an adapter's card names; none if there is no card that can be read."""
    path = folder / CARD_NAME
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_CARD:
            return []
        # A file that anybody may have written; of its metadata only names that the Hub would take are used.
        named = _listed((metadata_load(path) or {}).get("datasets"))
    except _UNREADABLE:
        return []
    return sorted({name for name in named if isinstance(name, str) and is_repo_id(name)})


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def is_repo_id(name: str) -> bool:
    """Whether something could be called so on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


# --- What it is ------------------------------------------------------------------------------------------------------


def _about_task(config: Described) -> str:
    name: str | None = getattr(config, "task_name", None)
    pool: PoolRecord | None = getattr(config, "pool", None)
    task = f" for the task “{plain(name)}”" if name else ""
    made = "Trained" if is_ours(config) else "Measured"
    about = f"# A task adapter{task}\n\n{made} with {_PLUGIN}, to be merged with others of its kind."
    measured = getattr(config.statistics, "tasks", ())
    if measured:
        samples, images = (sum(getattr(task, of) for task in measured) for of in ("samples", "images"))
        about += f" Its statistics were measured on {counted(samples, 'sample')} with {counted(images, 'image')}."
        kept = sum(task.kept_prompts for task in measured)
        about += f" They hold {counted(kept, 'prompt')} of these, word for word." if kept else ""
    return about if pool is None else about + _pooled(pool.tasks) + _history(pool.operations)


def _about_merge(merge: MergeRecord, has_projectors: bool) -> str:
    tasks = merge.tasks
    kinds, by = {INSTRUCTIONS: "instruction", BOTH: "images and instruction"}, str(merge.options.route_by)
    routed = f"routed by each row's {kinds[by]}" if by in kinds else "routed per image by visual prototypes"
    projectors = "averaged" if merge.averaged_projectors else routed
    goes_by = kinds.get(str(merge.options.gate_by), "images")
    gated = f", chosen among by each row's {goes_by}" if merge.options.gate_lora else ""
    parts = [
        f"# A merge of {counted(len(tasks), 'task adapter')}",
        f"Merged with {_PLUGIN}: language-model LoRAs by {_how(merge.options)}{gated}"
        + (f", projectors {projectors}." if has_projectors else "."),
        _table_of(tasks),
    ]
    if any(task.interference is not None for task in tasks):
        parts.append(
            "Interference is what merging is expected to cost a task, before any evaluation: the share of its LoRA's "
            "outputs on its own inputs that the merged LoRA changes, `‖(ΔW* − ΔW_t) C_t^½‖ / ‖ΔW_t C_t^½‖`, the mean "
            "over layers. 0 is as if alone, 1 as if the task's LoRA were lost. Compare merges of "
            "the same tasks by it, not tasks."
        )
    parts += [_routing(name, expected) for name, expected in most_telling(merge.expected_routing).items()]
    return (
        "\n\n".join(filter(None, parts))
        + _pooled([inner for task in tasks for inner in task.origin.pooled])
        + _history(merge.operations)
    )


def _routing(routed: str, expected: ExpectedRouting) -> str:
    """Where inputs are expected to go, in sentences and, of few tasks, as a table."""
    told, names = plain(" ".join(expected.in_words(routed))), list(expected.shares)
    if not 1 < len(names) <= _MOST_IN_TABLE:
        return told
    short = [plain(shortened(name)) for name in names]
    head = [f"{'inputs' if routed == GATES else 'images'} of", *short]
    rows = [[of, *(f"{share:.2f}" for share in row)] for of, row in zip(short, expected.matrix)]
    return f"{told}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _table_of(tasks: Sequence[TaskRecord]) -> str:
    columns: dict[str, Callable[[TaskRecord], str | None]] = {
        "task": lambda task: task.name,
        "source": lambda task: task.origin.source,
        "revision": lambda task: task.origin.revision,
        "adapter": lambda task: _options(task.origin.options),
        "weight": lambda task: f"{task.weight:g}",
        "samples": lambda task: str(task.samples),
        "images": lambda task: str(task.images),
        "prompts kept, word for word": lambda task: str(task.prompts or ""),
        "interference": lambda task: "" if task.interference is None else f"{task.interference:.3f}",
        "sha256": lambda task: task.origin.sha256[:12],
    }
    rows = [[plain(shortened(cell(task) or "")) for cell in columns.values()] for task in tasks]
    told = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line[place] for place in told)} |" for line in lines)


def _pooled(tasks: Sequence[PooledTask]) -> str:
    if not tasks:
        return ""
    lines = [f"- {plain(task.name)}, from {plain(task.source)}" for task in tasks]
    return "\n\nPooled tasks, which can be neither forgotten nor weighted one by one:\n\n" + "\n".join(lines)


def _history(operations: Sequence[Operation]) -> str:
    """What was done, a line for each operation."""
    lines = [
        f"1. {plain(in_words(line))} ({plain(_options(line.options))}; peft_many {plain(line.peft_many)})"
        for line in operations
    ]
    return "\n\nWhat was done, in this order:\n\n" + "\n".join(lines) if lines else ""


def in_words(operation: Operation) -> str:
    """One operation of those that a config records, and its tasks; as somebody wrote them, not escaped."""
    forgotten = [f"{operation.forgotten} since forgotten"] if operation.forgotten else []
    return f"{operation.kind}: {', '.join([*operation.tasks, *forgotten])}"


def _options(options: Mapping[str, Any]) -> str:
    # Sorted, as JSON keeps them: a card must not depend on whether its config was read from a file.
    told = {name: value["name"] if isinstance(value, dict) else value for name, value in options.items()}
    return ", ".join(f"{name} {value}" for name, value in sorted(told.items()) if value not in (None, False))


def plain(text: str | None) -> str:
    """A name that an adapter brought along, as text that is no Markdown or HTML of the card's."""
    return re.sub(r"([\\`|<>\[\]])", r"\\\1", " ".join((text or "").split()))


def _how(options: MergeOptions) -> str:
    if options.merge_method is None:
        return "least squares on input covariances"
    described = options.merge_method.describe()
    name, source = plain(described.pop("name")), plain(described.pop("source"))
    return f"`{name}({', '.join(f'{option}={value!r}' for option, value in described.items())})` ({source})"
