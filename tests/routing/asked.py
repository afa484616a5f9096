"""Tiny tasks that are told apart by what is asked, by what is shown, or by both, and merges of them."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_many import MAnyConfig, collect_statistics, merge_adapter_sequence
from tests import tiny
from tests.adapters import scatter
from tests.places import shared_folder

# Of each task, its words (which of `WORDS`), and the style of its pictures, if it has any.
Task = tuple[int, int | None]
CROSSED: tuple[Task, ...] = ((0, 0), (1, 0), (0, 3), (1, 3))  # neither pictures nor words tell all of them apart
SHARED: tuple[Task, ...] = ((0, 0), (1, 0), (2, 0))  # other words on the same pictures
TEXTS: tuple[Task, ...] = ((0, None), (1, None), (2, None))
MIXED: tuple[Task, ...] = ((0, 0), (1, 0), (2, None))
WORDS = ([11, 12, 13, 14], [41, 42, 43], [71, 72, 73, 74, 75], [14, 13, 12, 11])
TEXT_MODELS = ("llama", "t5")


def question(words: int, seed: int) -> list[int]:
    """What is asked: always the same words, and one of five among them."""
    slot = random.Random(seed).choice(range(90, 95))
    return [*WORDS[words][:2], slot, *WORDS[words][2:]]


def pictures(family: str, style: int | None, seed: int) -> list[Tensor]:
    return [] if style is None else [tiny.random_image(family, seed, style=style, size=tiny.sizes(family)[0])]


def base(family: str) -> PreTrainedModel:
    return tiny.build_text(family) if family in TEXT_MODELS else tiny.build(family)


def batch(
    model: nn.Module,
    family: str,
    rows: Sequence[Task],
    seed: int = 900,
    side: str = "left",
    answers: int = 0,
) -> dict[str, Tensor]:
    """A row for each task; with answers, there are labels."""
    drawn = random.Random(seed)
    asked = [question(words, seed + n) for n, (words, _) in enumerate(rows)]
    answered = [
        [drawn.choice(tiny.TEXT_TOKENS) for _ in range(answers + n % 2)] if answers else [] for n in range(len(rows))
    ]
    shown = [pictures(family, style, seed + n) for n, (_, style) in enumerate(rows)]
    prompts = [a + b for a, b in zip(asked, answered)]
    found = tiny.batch(model, "llava" if family in TEXT_MODELS else family, shown, prompts, side)
    if answers:
        labels = torch.full_like(found["input_ids"], -100)
        for row, tokens in enumerate(answered):
            ends = int(found["attention_mask"][row].nonzero().max()) + 1
            labels[row, ends - len(tokens) : ends] = torch.tensor(tokens)
        found["labels"] = labels
    return found


def adapter(model: PreTrainedModel, family: str, task: Task, seed: int, **options: Any) -> PeftModel:
    """A measured adapter, trained at random; the projector stays the base model's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = get_peft_model(
            model, MAnyConfig(r=4, lora_alpha=8, task_name=f"t{seed}", **{"projector_modules": [], **options})
        )
    scatter(found, seed)
    batches = [batch(found, family, [task] * 4, 10 * n, side, answers=3) for n, side in enumerate(("left", "right"))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        collect_statistics(found, batches, progress=False)
    return found


@functools.cache
def folder(family: str, task: Task, seed: int) -> Path:
    """The folder of a task's adapter, made once."""
    made = shared_folder(f"asked-{family}-{seed}-{task}-")
    adapter(base(family), family, task, seed).save_pretrained(str(made))
    return made


def folders(family: str, tasks: tuple[Task, ...]) -> list[Path]:
    return [folder(family, task, seed) for seed, task in enumerate(tasks)]


def merge(family: str, tasks: tuple[Task, ...], gate_by: str | None, **options: Any) -> PeftModel:
    """A fresh merge; where images count, an image is one task's alone."""
    options = {"progress": False, "temperature": 0.01, "gate_by": gate_by, **options}
    return merge_adapter_sequence(base(family), folders(family, tasks), **options)


@functools.cache
def merged(family: str, tasks: tuple[Task, ...], gate_by: str | None) -> PeftModel:
    """A merge that tests only read; without `gate_by` it has no gate."""
    return merge(family, tasks, gate_by)


@functools.cache
def alone(family: str, task: Task, seed: int) -> PeftModel:
    return PeftModel.from_pretrained(base(family), str(folder(family, task, seed))).eval()


def owners(family: str, tasks: tuple[Task, ...]) -> list[PeftModel]:
    return [alone(family, task, seed) for seed, task in enumerate(tasks)]
