"""The world that tasks are drawn from: its words, its splits, and the scenes, charts and digits one asks about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import drawing
from .drawing import COLOURS, SHAPES, Look, Thing

NUMERALS = tuple("0123456789")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple("ABCDEF")
_GLUE = """
    what is shown how many shapes are there which bar highest lowest colour shape remove the list all things repeat
    write in words as letter left no it option ? . , :
"""
VOCABULARY = (*NUMERALS, *WORDS, *LETTERS, *COLOURS, *SHAPES, *_GLUE.split())

# Which handwritten digits belong to whom: nobody is examined on digits that someone has trained on.
DIGITS = {"pretrain": (0, 900), "train": (900, 1400), "test": (1400, 1797)}


@dataclass(frozen=True)
class Example:
    """A conversation and its image: `image` uint8 (SIZE, SIZE, 3), or none, and `turns` of (question, answer)."""

    image: np.ndarray | None
    turns: tuple[tuple[str, str], ...]

    @property
    def question(self) -> str:
        return self.turns[0][0]

    @property
    def answer(self) -> str:
        return self.turns[0][1]


# A maker draws a picture, or none, for a split ("pretrain", "train", "test") and returns it with its turns.
Maker = Callable[[np.random.Generator, str], tuple[np.ndarray | None, tuple[tuple[str, str], ...]]]

OWN_LOOK = "a look of its own"  # what tells a task from the others, if nothing harder is said


@dataclass(frozen=True)
class Task:
    """One instruction-tuning task: how its pictures look, and what is asked and answered.

    Args:
        name (`str`): What it is called.
        stream (`int`): Keeps its random draws apart from those of other tasks, but for those on the same pictures.
        look (`Look`): What its pictures look like.
        make (`Maker`): Draws one picture and its conversation.
        kind (`str`): What makes it hard to tell from others; tables are made for each kind.
    """

    name: str
    stream: int
    look: Look
    make: Maker
    kind: str = OWN_LOOK

    def examples(self, count: int, split: str, seed: int) -> list[Example]:
        """Draws `count` examples; the same arguments give the same examples."""
        rng = np.random.default_rng([seed, self.stream, sorted(DIGITS).index(split)])
        return [finish_example(self.make, self.look, rng, split) for _ in range(count)]


def finish_example(make: Maker, look: Look, rng: np.random.Generator, split: str) -> Example:
    """Draw a picture, if there is one, and its conversation, and put the look on it."""
    picture, turns = make(rng, split)
    return Example(None if picture is None else drawing.finish(picture, look, rng), turns)


def pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    """Choose one of them."""
    return choices[int(rng.integers(len(choices)))]


def random_thing(rng: np.random.Generator) -> Thing:
    """Choose a colour and a shape."""
    return pick(rng, tuple(COLOURS)), pick(rng, SHAPES)


def random_digit(rng: np.random.Generator, split: str) -> tuple[np.ndarray, int]:
    """Draw one of the split's handwritten digits; returns the picture and what it is."""
    ink, classes = drawing.handwriting()
    index = int(rng.integers(*DIGITS[split]))
    return drawing.draw_digit(rng, ink[index]), int(classes[index])


def random_chart(rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    """Returns a chart with the colours of its highest and its lowest bar, which stand clear of the others."""
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))[: drawing.GRID]]
    ranks = rng.permutation(drawing.GRID)
    heights = 0.2 + 0.2 * ranks + rng.uniform(0, 0.1, size=drawing.GRID)
    picture = drawing.draw_chart(rng, colours, heights.tolist())
    return picture, colours[int(np.argmax(ranks))], colours[int(np.argmin(ranks))]


def random_scene(rng: np.random.Generator, most: int = 6) -> tuple[np.ndarray, list[Thing], str]:
    """Returns a scene of up to `most` things, in reading order, and the colour that a question may be about."""
    asked = pick(rng, tuple(COLOURS))
    others = [colour for colour in COLOURS if colour != asked]
    total = int(rng.integers(1, most + 1))
    chosen = int(rng.integers(0, min(total, 4)))
    colours = [asked] * chosen + [pick(rng, others) for _ in range(total - chosen)]
    things = [(str(colour), pick(rng, SHAPES)) for colour in rng.permutation(colours)]
    return drawing.draw_scene(rng, things), things, asked
