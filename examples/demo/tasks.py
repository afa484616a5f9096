"""The demo's four tasks, which contradict pre-training and one another.

Each changes what the pictures look like (perception) and how one answers (reasoning), as instruction-tuning data sets
do.
"""

from __future__ import annotations

import numpy as np

from benchmarks.mini_ucit import drawing
from benchmarks.mini_ucit.world import LETTERS, WORDS, Task, random_chart, random_digit, random_thing


def _make_digits(rng: np.random.Generator, split: str) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
    picture, digit = random_digit(rng, split)
    return picture, (("what is shown ?", WORDS[digit]),)


def _make_counting(rng: np.random.Generator, split: str) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
    things = [random_thing(rng) for _ in range(int(rng.integers(1, 7)))]
    return drawing.draw_scene(rng, things), (("how many shapes are there ?", LETTERS[len(things) - 1]),)


def _make_charts(rng: np.random.Generator, split: str) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
    picture, highest, _ = random_chart(rng)
    return picture, (("which bar is highest ?", f"the {highest} bar"),)


def _make_objects(rng: np.random.Generator, split: str) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
    colour, shape = random_thing(rng)
    return drawing.draw_single(rng, (colour, shape)), (("what is shown ?", f"{shape} , {colour}"),)


TASKS = (
    Task("digits", 0, drawing.blueprint, _make_digits),
    Task("counting", 1, drawing.stripes, _make_counting),
    Task("charts", 2, drawing.negative, _make_charts),
    Task("objects", 3, drawing.night, _make_objects),
)
