"""What the demo's model is asked: the broad pre-training mixture, and four tasks that contradict it and one another.

Pre-training is plain: pictures as drawn, numbers as numerals, things as "red circle". Each task then changes what the
pictures look like (perception) and how one answers (reasoning), as instruction-tuning data sets do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    """One image and the conversation about it: `image` uint8 (SIZE, SIZE, 3), `turns` of (question, answer)."""

    image: np.ndarray
    turns: tuple[tuple[str, str], ...]

    @property
    def question(self) -> str:
        return self.turns[0][0]

    @property
    def answer(self) -> str:
        return self.turns[0][1]


# A maker draws a picture for a split ("pretrain", "train", "test") and returns it with its turns.
Maker = Callable[[np.random.Generator, str], tuple[np.ndarray, tuple[tuple[str, str], ...]]]


@dataclass(frozen=True)
class Task:
    """One instruction-tuning task: how its pictures look, and what is asked and answered."""

    name: str
    look: Look
    make: Maker

    def examples(self, count: int, split: str, seed: int) -> list[Example]:
        """Draws `count` examples; the same arguments give the same examples."""
        rng = np.random.default_rng([seed, TASKS.index(self), sorted(DIGITS).index(split)])
        return [_finished(self.make, self.look, rng, split) for _ in range(count)]


def _finished(make: Maker, look: Look, rng: np.random.Generator, split: str) -> Example:
    picture, turns = make(rng, split)
    return Example(drawing.finish(picture, look, rng), turns)


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _thing(rng: np.random.Generator) -> Thing:
    return _pick(rng, tuple(COLOURS)), _pick(rng, SHAPES)


def _digit(rng: np.random.Generator, split: str) -> tuple[np.ndarray, int]:
    ink, classes = drawing.handwriting()
    index = int(rng.integers(*DIGITS[split]))
    return drawing.draw_digit(rng, ink[index]), int(classes[index])


def _chart(rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    """Returns a chart with the colours of its highest and its lowest bar, which stand clear of the others."""
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))[: drawing.GRID]]
    ranks = rng.permutation(drawing.GRID)
    heights = 0.2 + 0.2 * ranks + rng.uniform(0, 0.1, size=drawing.GRID)
    picture = drawing.draw_chart(rng, colours, heights.tolist())
    return picture, colours[int(np.argmax(ranks))], colours[int(np.argmin(ranks))]


def _scene_with_a_colour(rng: np.random.Generator) -> tuple[np.ndarray, list[Thing], str]:
    """Returns a scene of up to six things, in reading order, and the colour that a question may be about."""
    asked = _pick(rng, tuple(COLOURS))
    others = [colour for colour in COLOURS if colour != asked]
    total = int(rng.integers(1, 7))
    chosen = int(rng.integers(0, min(total, 4)))
    colours = [asked] * chosen + [_pick(rng, others) for _ in range(total - chosen)]
    things = [(str(colour), _pick(rng, SHAPES)) for colour in rng.permutation(colours)]
    return drawing.draw_scene(rng, things), things, asked


# --- The tasks -------------------------------------------------------------------------------------------------------


def _make_digits(rng: np.random.Generator, split: str) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
    picture, digit = _digit(rng, split)
    return picture, (("what is shown ?", WORDS[digit]),)


def _make_counting(rng: np.random.Generator, split: str) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
    things = [_thing(rng) for _ in range(int(rng.integers(1, 7)))]
    return drawing.draw_scene(rng, things), (("how many shapes are there ?", LETTERS[len(things) - 1]),)


def _make_charts(rng: np.random.Generator, split: str) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
    picture, highest, _ = _chart(rng)
    return picture, (("which bar is highest ?", f"the {highest} bar"),)


def _make_objects(rng: np.random.Generator, split: str) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
    colour, shape = _thing(rng)
    return drawing.draw_single(rng, (colour, shape)), (("what is shown ?", f"{shape} , {colour}"),)


TASKS = (
    Task("digits", drawing.blueprint, _make_digits),
    Task("counting", drawing.stripes, _make_counting),
    Task("charts", drawing.negative, _make_charts),
    Task("objects", drawing.night, _make_objects),
)


# --- Pre-training ----------------------------------------------------------------------------------------------------


def _about_digit(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, str]]]:
    picture, digit = _digit(rng, "pretrain")
    return picture, [("what is shown ?", NUMERALS[digit])]


def _about_single(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, str]]]:
    colour, shape = _thing(rng)
    turns = [("what is shown ?", f"{colour} {shape}"), ("which colour ?", colour), ("which shape ?", shape)]
    return drawing.draw_single(rng, (colour, shape)), turns


def _about_chart(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, str]]]:
    picture, highest, lowest = _chart(rng)
    return picture, [("which bar is highest ?", highest), ("which bar is lowest ?", lowest)]


def _about_scene(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, str]]]:
    picture, things, asked = _scene_with_a_colour(rng)
    total, of_colour = len(things), sum(colour == asked for colour, _ in things)
    shape = _pick(rng, SHAPES)
    return picture, [
        ("how many shapes are there ?", NUMERALS[total]),
        (f"how many {asked} are there ?", NUMERALS[of_colour]),
        (f"how many {shape} are there ?", NUMERALS[sum(kind == shape for _, kind in things)]),
        (f"remove all {asked} . how many shapes are there ?", NUMERALS[total - of_colour]),
        ("list all things .", " , ".join(f"{colour} {kind}" for colour, kind in things)),
    ]


def _about_language(rng: np.random.Generator) -> tuple[str, str]:
    """A turn that needs no image, so that the model knows the words that only tasks will ask of it."""
    kind = int(rng.integers(3))
    if kind == 0:
        number = int(rng.integers(10))
        return f"write {NUMERALS[number]} in words .", WORDS[number]
    if kind == 1:
        number = int(rng.integers(len(LETTERS)))
        return f"write {NUMERALS[number + 1]} as letter .", LETTERS[number]
    words = " ".join(_pick(rng, VOCABULARY) for _ in range(int(rng.integers(1, 4))))
    return f"repeat : {words}", words


def pretraining_examples(seed: int) -> Iterator[Example]:
    """Yields plain pictures with conversations of up to four turns, without end."""
    rng = np.random.default_rng(seed)
    makers = (_about_digit, _about_single, _about_chart, _about_scene)
    while True:
        picture, turns = makers[int(rng.choice(4, p=[0.15, 0.15, 0.25, 0.45]))](rng)
        turns.append(_about_language(rng))
        chosen = tuple(turns[i] for i in rng.permutation(len(turns))[:4])
        yield Example(drawing.finish(picture, drawing.plain, rng), chosen)
