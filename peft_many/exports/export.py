"""What every export has in common: the tensors that it reads, the folder that it becomes, the card that says so."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from torch import Tensor

from ..algebra.reduction import padded
from ..files.adapter import Adapter
from ..files.atomic import new_folder, writable_place
from ..files.card import CARD_NAME, is_repo_id, plain
from ..files.patterns import exceptions_by_pattern
from ..files.tensor_keys import lora_key
from ..records.words import counted, shortened
from ..version import __version__

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # by layer, `A` with the LoRA scaling folded in, and `B`
Config = TypeVar("Config", bound=LoraConfig)


@dataclass(frozen=True)
class Export:
    """What was exported.

    Args:
        folder (`Path`): Where it is; or would be, of a dry run.
        notes (`list[str]`): What it cannot do that the adapter could; the folder's `README.md` says so too.
    """

    folder: Path
    notes: list[str]


@contextmanager
def export_folder(output: Path, dry_run: bool) -> Iterator[Path]:
    """The folder to write an export into; of a dry run one that nobody will see, once it could be the other."""
    if not dry_run:
        with new_folder(output) as folder:
            yield folder
        return
    writable_place(output)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")  # the model has no weights
        yield Path(place)


def read_pairs(adapter: Adapter) -> Pairs:
    """The LoRA in the dtype that it is stored in; of other PEFT methods, which store none, factors of the delta."""
    if not adapter.pairs:
        read = {module: delta.read() for module, delta in sorted(adapter.tasks[0].deltas.items())}
        return {module: (delta.A, delta.B) for module, delta in read.items()}
    found = {}
    for module, pair in sorted(adapter.pairs.items()):
        dtype = pair.weights.dtype(pair.key("A"))
        delta = pair.read()
        found[module] = (delta.A.to(dtype), delta.B.to(dtype))
    return found


def as_lora(
    adapter: Adapter, pairs: Pairs, kind: type[Config], *, pad: bool = True, **options: Any
) -> tuple[Config, dict[str, Tensor]]:
    """A config with a scaling of one, and its tensors: all filled up with zeros to the largest rank, or not."""
    ranks = {module: A.shape[0] for module, (A, _) in pairs.items()}
    rank = max(ranks.values())
    smaller = {} if pad else exceptions_by_pattern(ranks, rank)
    config = kind(
        r=rank,
        lora_alpha=rank,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        target_modules=sorted(pairs),
        fan_in_fan_out=bool(getattr(adapter.config, "fan_in_fan_out", False)),
        inference_mode=True,
        **options,
    )
    config.target_modules = sorted(pairs)  # a set would be saved in another order by every process
    tensors = {}
    for module, pair in pairs.items():
        for half, tensor in zip("AB", padded(*pair, rank) if pad else pair):
            tensors[lora_key(module, half)] = tensor
    return config, tensors


def notes_on_gate(adapter: Adapter) -> list[str]:
    """What no export can keep of a merge with `gate_lora`."""
    if adapter.merge is not None and adapter.merge.options.gate_lora:
        return ["All inputs get the merged LoRA; the choice among the tasks' own (`gate_lora`) cannot be exported."]
    return []


def public_model(base_model: str | None) -> str | None:
    """A base model that the Hub could link to; a folder of the user's own is nobody else's business."""
    return base_model if base_model and is_repo_id(base_model) and not Path(base_model).exists() else None


def write_card(
    folder: Path, title: str, adapter: Adapter, base_model: str | None, usage: str, notes: Sequence[str], **data: Any
) -> None:
    """Write the card: what the export is (`{tasks}` in the title becomes "3 tasks"), how to use it, what it lacks."""
    about = ModelCardData(
        base_model=public_model(base_model), tags=["continual-learning", "lora", "merge", "peft-many"], **data
    )
    tasks = counted(len(adapter.tasks), "task")
    cells = [(shortened(task.name), task.origin.source, task.origin.revision) for task in adapter.tasks]
    rows = "\n".join(
        f"| {' | '.join(map(plain, cell))} | {task.weight:g} |" for cell, task in zip(cells, adapter.tasks)
    )
    said = "\n".join(f"- {note}" for note in notes)
    text = (
        f"# {title.format(tasks=tasks)}\n\nExported by `peft_many` {__version__} (MAny, arXiv 2604.14016).\n\n"
        f"{usage}\n\n{said}\n\n| task | source | revision | weight |\n|---|---|---|---|\n{rows}\n"
    )
    ModelCard(f"---\n{about.to_yaml()}\n---\n\n{text}").save(folder / CARD_NAME)
