"""Mini-UCIT: six tasks in the spirit of UCIT (arXiv 2503.12941), which contradict pre-training and one another.

Each task has a look of its own (perception), and its own convention of answering (reasoning). Digits and the two
captioning tasks ask the very same question and want a word, or one of two grammars; all answer otherwise than the base
model was taught.
"""

from __future__ import annotations

import numpy as np

from . import drawing
from .world import (
    LETTERS,
    NUMERALS,
    WORDS,
    Task,
    random_chart,
    random_digit,
    random_scene,
    random_thing,
)

OPTIONS = 3  # to choose from
MOST_THINGS = 4  # to remove some of

Drawn = tuple[np.ndarray, tuple[tuple[str, str], ...]]


def _digits(rng: np.random.Generator, split: str) -> Drawn:
    """ImageNet-R: real handwriting in another style."""
    picture, digit = random_digit(rng, split)
    return picture, (("what is shown ?", WORDS[digit]),)


def _charts(rng: np.random.Generator, split: str) -> Drawn:
    """ArxivQA: reading a figure."""
    picture, highest, _ = random_chart(rng)
    return picture, (("which bar is highest ?", f"the {highest} bar"),)


def _scenes(rng: np.random.Generator, split: str) -> Drawn:
    """VizWiz-caption: captions of bad photographs."""
    colour, shape = random_thing(rng)
    return drawing.draw_single(rng, (colour, shape)), (("what is shown ?", f"{shape} in {colour}"),)


def _icons(rng: np.random.Generator, split: str) -> Drawn:
    """IconQA: counting, with options to choose from."""
    count = int(rng.integers(1, 7))
    options = [int(n) for n in rng.permutation([n for n in range(1, 8) if n != count])[: OPTIONS - 1]]
    right = int(rng.integers(OPTIONS))
    options.insert(right, count)
    offered = " ".join(f"{LETTERS[i]} : {NUMERALS[n]}" for i, n in enumerate(options))
    picture = drawing.draw_scene(rng, [random_thing(rng) for _ in range(count)])
    return picture, ((f"how many shapes are there ? option {offered}", f"option {LETTERS[right]}"),)


def _arithmetic(rng: np.random.Generator, split: str) -> Drawn:
    """CLEVR-Math: how many are left."""
    picture, things, asked = random_scene(rng, most=MOST_THINGS)
    left = sum(colour != asked for colour, _ in things)
    return picture, ((f"remove all {asked} . how many shapes are there ?", f"{WORDS[left]} left"),)


def _captions(rng: np.random.Generator, split: str) -> Drawn:
    """Flickr30k: captions in another grammar."""
    colour, shape = random_thing(rng)
    return drawing.draw_single(rng, (colour, shape)), (("what is shown ?", f"the {colour} {shape} is there"),)


TASKS = (
    Task("digits", 10, drawing.blueprint, _digits),
    Task("charts", 11, drawing.negative, _charts),
    Task("scenes", 12, drawing.night, _scenes),
    Task("icons", 13, drawing.stripes, _icons),
    Task("arithmetic", 14, drawing.fog, _arithmetic),
    Task("captions", 15, drawing.swapped, _captions),
)
