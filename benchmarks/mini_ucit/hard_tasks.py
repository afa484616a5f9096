"""The hard half: eighteen tasks that their pictures, their instructions, or both, do not tell from others.

A task is a way of drawing, a few wordings of one instruction, and a form of the answer, which contradicts pre-training
and the other tasks. Tasks of one stream have the same pictures, to the pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import drawing
from .drawing import Look
from .tasks import TASKS
from .world import (
    LETTERS,
    NUMERALS,
    VOCABULARY,
    WORDS,
    Task,
    pick,
    random_chart,
    random_digit,
    random_scene,
    random_thing,
)

PICTURES = "the same pictures"
WORD = "the same pictures, one word differs"
FLOOR = "the same pictures and instruction"
TEXT = "no pictures"
LOOKS = "looks that overlap"

# Draws a picture, or none, for a split, and returns it with what there is to say of it, by the names of the templates.
Drawer = Callable[[np.random.Generator, str], tuple[np.ndarray | None, dict[str, str]]]


def _single(rng: np.random.Generator, split: str) -> tuple[np.ndarray, dict[str, str]]:
    colour, shape = random_thing(rng)
    return drawing.draw_single(rng, (colour, shape)), {"colour": colour, "shape": shape}


def _chart(rng: np.random.Generator, split: str) -> tuple[np.ndarray, dict[str, str]]:
    picture, highest, lowest = random_chart(rng)
    return picture, {"highest": highest, "lowest": lowest}


def _digit(rng: np.random.Generator, split: str) -> tuple[np.ndarray, dict[str, str]]:
    picture, digit = random_digit(rng, split)
    return picture, {"numeral": NUMERALS[digit]}


def _scene(rng: np.random.Generator, split: str) -> tuple[np.ndarray, dict[str, str]]:
    picture, things, asked = random_scene(rng, most=3)
    there = sum(colour == asked for colour, _ in things)
    return picture, {
        "count": WORDS[len(things)],
        "asked": asked,
        "there": WORDS[there],
        "left": asked if there else f"no {asked}",
        "colours": " , ".join(colour for colour, _ in things),
    }


def _words(rng: np.random.Generator, split: str) -> tuple[None, dict[str, str]]:
    words = [pick(rng, VOCABULARY) for _ in range(int(rng.integers(2, 5)))]
    return None, {"words": " ".join(words), "count": WORDS[len(words)]}


def _two_words(rng: np.random.Generator, split: str) -> tuple[None, dict[str, str]]:
    first, second = pick(rng, VOCABULARY), pick(rng, VOCABULARY)  # three are not learnt in the steps that a task has
    return None, {"words": f"{first} {second}", "backwards": f"{second} {first}"}


def _numbers(rng: np.random.Generator, split: str) -> tuple[None, dict[str, str]]:
    numbers = rng.integers(len(LETTERS), size=int(rng.integers(1, 4)))
    return None, {
        "numbers": " ".join(NUMERALS[n + 1] for n in numbers),
        "letters": " ".join(LETTERS[n] for n in numbers),
    }


def _task(name: str, kind: str, stream: int, look: Look, draw: Drawer, questions: Sequence[str], answer: str) -> Task:
    def make(rng: np.random.Generator, split: str) -> tuple[np.ndarray | None, tuple[tuple[str, str], ...]]:
        picture, facts = draw(rng, split)
        return picture, ((pick(rng, questions).format(**facts), answer.format(**facts)),)

    return Task(name, stream, look, make, kind)


_SHOWN = ("what is shown ?", "what is it ?", "write it in words .")
_CAPTION = ("what is shown ?", "what is shown there ?", "write what is shown .")
_BAR = ("which bar is {} ?", "which bar is the {} ?", "what colour is the {} bar ?")
_OF_COLOUR = ("how many {{asked}} are {} ?", "how many {{asked}} things are {} ?", "list how many {{asked}} are {} .")


def _with_word(templates: Sequence[str], word: str) -> tuple[str, ...]:
    return tuple(template.format(word) for template in templates)


HARD = (
    _task(
        "colours",
        PICTURES,
        20,
        drawing.rose,
        _single,
        ("which colour is the shape ?", "what colour is shown ?", "write the colour in words ."),
        "it is {colour}",
    ),
    _task(
        "shapes",
        PICTURES,
        20,
        drawing.rose,
        _single,
        ("which shape is it ?", "what shape is shown ?", "write the shape in words ."),
        "shape : {shape}",
    ),
    _task(
        "sentences",
        PICTURES,
        20,
        drawing.rose,
        _single,
        _CAPTION,
        "there is the {shape}",
    ),
    _task(
        "counting",
        PICTURES,
        21,
        drawing.chalk,
        _scene,
        ("how many things are shown ?", "how many are there in all ?", "write how many there are ."),
        "there are {count}",
    ),
    _task(
        "listing",
        PICTURES,
        21,
        drawing.chalk,
        _scene,
        ("list all things .", "which colour are the things ?", "what colour are all things ?"),
        "{colours}",
    ),
    _task("of-colour", WORD, 21, drawing.chalk, _scene, _with_word(_OF_COLOUR, "there"), "{there} in {asked}"),
    _task("left-over", WORD, 21, drawing.chalk, _scene, _with_word(_OF_COLOUR, "left"), "{left} left"),
    _task("highest", WORD, 22, drawing.glass, _chart, _with_word(_BAR, "highest"), "bar : {highest}"),
    _task("lowest", WORD, 22, drawing.glass, _chart, _with_word(_BAR, "lowest"), "it is {lowest}"),
    _task("options", FLOOR, 23, drawing.lattice, _digit, _SHOWN, "option {numeral}"),
    _task("numbers", FLOOR, 23, drawing.lattice, _digit, _SHOWN, "{numeral} is shown"),
    _task("labels", FLOOR, 24, drawing.faded, _single, _CAPTION, "the shape is {shape}"),
    _task("forms", FLOOR, 24, drawing.faded, _single, _CAPTION, "the colour is {colour}"),
    _task(
        "backwards",
        TEXT,
        25,
        drawing.plain,
        _two_words,
        ("repeat : {words}", "write in words : {words}", "list the words : {words}"),
        "{backwards}",
    ),
    _task(
        "word-counts",
        TEXT,
        29,
        drawing.plain,
        _words,
        ("how many words are there : {words}", "how many words : {words}", "how many are there ? {words}"),
        "{count} words",
    ),
    _task(
        "spelling",
        TEXT,
        26,
        drawing.plain,
        _numbers,
        ("write {numbers} in words .", "write {numbers} as words .", "list {numbers} in words ."),
        "{letters}",
    ),
    _task(
        "dusk",
        LOOKS,
        27,
        drawing.either(drawing.night, drawing.fog),
        _single,
        ("which shape is there ?", "what shape is it ?", "list the shape ."),
        "no colour , {shape}",
    ),
    _task(
        "haze",
        LOOKS,
        28,
        drawing.between(drawing.fog, drawing.stripes),
        _scene,
        ("how many shapes are shown ?", "how many are there ?", "write how many shapes there are ."),
        "{count} shapes",
    ),
)

ALL = (*TASKS, *HARD)
