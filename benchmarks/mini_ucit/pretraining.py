"""How the tiny models are pre-trained: on plain pictures, numbers as numerals, things as "red circle"."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from . import drawing
from .drawing import SHAPES, Look
from .model import Collator, TinyModel
from .training import accuracy, train
from .world import (
    LETTERS,
    NUMERALS,
    VOCABULARY,
    WORDS,
    Example,
    pick,
    random_chart,
    random_digit,
    random_scene,
    random_thing,
)


def _about_digit(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, str]]]:
    picture, digit = random_digit(rng, "pretrain")
    return picture, [("what is shown ?", NUMERALS[digit])]


def _about_single(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, str]]]:
    colour, shape = random_thing(rng)
    turns = [("what is shown ?", f"{colour} {shape}"), ("which colour ?", colour), ("which shape ?", shape)]
    return drawing.draw_single(rng, (colour, shape)), turns


def _about_chart(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, str]]]:
    picture, highest, lowest = random_chart(rng)
    return picture, [("which bar is highest ?", highest), ("which bar is lowest ?", lowest)]


def _about_scene(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, str]]]:
    picture, things, asked = random_scene(rng)
    total, of_colour = len(things), sum(colour == asked for colour, _ in things)
    shape = pick(rng, SHAPES)
    return picture, [
        ("how many shapes are there ?", NUMERALS[total]),
        (f"how many {asked} are there ?", NUMERALS[of_colour]),
        (f"how many {shape} are there ?", NUMERALS[sum(kind == shape for _, kind in things)]),
        (f"remove all {asked} . how many shapes are there ?", NUMERALS[total - of_colour]),
        ("list all things .", " , ".join(f"{colour} {kind}" for colour, kind in things)),
    ]


def about_language(rng: np.random.Generator) -> tuple[str, str]:
    """A turn that needs no image, so that the model knows the words that only tasks will ask of it."""
    kind = int(rng.integers(3))
    if kind == 0:
        number = int(rng.integers(10))
        return f"write {NUMERALS[number]} in words .", WORDS[number]
    if kind == 1:
        number = int(rng.integers(len(LETTERS)))
        return f"write {NUMERALS[number + 1]} as letter .", LETTERS[number]
    words = " ".join(pick(rng, VOCABULARY) for _ in range(int(rng.integers(1, 4))))
    return f"repeat : {words}", words


def pretraining_examples(seed: int, look: Look = drawing.plain) -> Iterator[Example]:
    """Yields pictures, plain ones in pre-training, with conversations of up to four turns, without end."""
    rng = np.random.default_rng(seed)
    makers = (_about_digit, _about_single, _about_chart, _about_scene)
    while True:
        picture, turns = makers[int(rng.choice(4, p=[0.15, 0.15, 0.25, 0.45]))](rng)
        turns.append(about_language(rng))
        chosen = tuple(turns[i] for i in rng.permutation(len(turns))[:4])
        yield Example(drawing.finish(picture, look, rng), chosen)


def pretrain(
    tiny: TinyModel,
    folder: Path,
    steps: int = 6_000,
    batch_size: int = 64,
    seed: int = 0,
) -> PreTrainedModel:
    """Pre-train a model from scratch and save it, in float16 to be small, with its tokenizer.

    Args:
        tiny ([`TinyModel`]): Which.
        folder (`Path`): Where to.
        steps (`int`): Batches of `batch_size` pictures.
        batch_size (`int`): Pictures in a batch, each with up to four questions.
        seed (`int`): Draws the weights and the pictures.

    Returns:
        `PreTrainedModel`: The model, float32, in evaluation mode.
    """
    torch.manual_seed(seed)
    collate = Collator(tiny)
    model = tiny.build()
    batches = _batches(collate, batch_size, seed)
    train(
        model,
        batches,
        steps,
        tiny.learning_rate,
        weight_decay=0.05,
        autocast=tiny.bfloat16,
        label=f"pre-training {tiny.name}",
    )
    model.half().save_pretrained(folder)
    collate.tokenizer.save_pretrained(folder)
    return model.float()


def examine(model: PreTrainedModel, tiny: TinyModel, seed: int, count: int = 1500) -> dict[str, float]:
    """Exact-match accuracy in per cent for each kind of pre-training question, on fresh pictures."""
    kinds: dict[str, list[Example]] = {}
    for example in islice(pretraining_examples(seed), count):
        first = example.question.split()
        kinds.setdefault(" ".join(first[:2]) if first[0] != "what" else "what is shown", []).append(example)
    prompts = Collator(tiny, prompts_only=True)
    return {kind: accuracy(model, prompts, found) for kind, found in sorted(kinds.items())}


def _batches(collate: Collator, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end, each of about equal lengths: less padding."""
    stream = pretraining_examples(seed)
    rng = np.random.default_rng(seed)
    while True:
        pool = sorted(islice(stream, 16 * size), key=lambda example: sum(len(f"{q} {a}") for q, a in example.turns))
        for chunk in rng.permutation(16):
            yield collate(pool[chunk * size : (chunk + 1) * size])
