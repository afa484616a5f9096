"""Pictures, drawn on the spot: scenes of small shapes, one big shape, bar charts, handwritten digits.

Pictures are float64 arrays (SIZE, SIZE, 3) in [0, 1] until `finish` turns them into uint8. A *look* is a function
from (picture, generator) to a picture: the way in which the pictures of one task differ from those the base model saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

SIZE = 48  # pixels per side
GRID = 4  # scenes and charts place their things on GRID x GRID cells
CELL = SIZE // GRID

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.85, 0.15),
    "blue": (0.15, 0.15, 0.85),
    "yellow": (0.85, 0.85, 0.15),
    "cyan": (0.15, 0.85, 0.85),
    "purple": (0.85, 0.15, 0.85),
}
SHAPES = ("circle", "square", "triangle", "cross")

Look = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Thing = tuple[str, str]  # colour, shape


def paper(rng: np.random.Generator) -> np.ndarray:
    """Returns an empty sheet of slightly varying light grey, (SIZE, SIZE, 3)."""
    return np.full((SIZE, SIZE, 3), rng.uniform(0.88, 0.98))


def _cover(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Returns how much of each pixel a shape covers, in [0, 1]; x, y: offsets from its centre, broadcast together."""
    if shape == "circle":
        outside = np.sqrt(x**2 + y**2) - radius
    elif shape == "square":
        outside = np.maximum(abs(x), abs(y)) - 0.9 * radius
    elif shape == "triangle":
        outside = np.maximum(y - 0.8 * radius, 0.89 * abs(x) - 0.45 * y - 0.6 * radius)
    elif shape == "cross":
        thin, long = 0.35 * radius, radius
        outside = np.minimum(
            np.maximum(abs(x) - thin, abs(y) - long),
            np.maximum(abs(x) - long, abs(y) - thin),
        )
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return np.clip(0.5 - outside, 0.0, 1.0)


def _paint(picture: np.ndarray, thing: Thing, column: float, row: float, radius: float, shade: float) -> None:
    """Paints a (colour, shape) into the picture, in place, around (column, row) in pixels."""
    colour, shape = thing
    left, right = max(int(column - radius) - 1, 0), min(int(column + radius) + 3, SIZE)
    top, bottom = max(int(row - radius) - 1, 0), min(int(row + radius) + 3, SIZE)
    x = np.arange(left, right)[None, :] - column
    y = np.arange(top, bottom)[:, None] - row
    cover = _cover(shape, x, y, radius)[..., None]
    window = picture[top:bottom, left:right]
    window += cover * (shade * np.asarray(COLOURS[colour]) - window)


def draw_scene(rng: np.random.Generator, things: Sequence[Thing]) -> np.ndarray:
    """Draws up to GRID * GRID things, each in its own cell, in reading order; returns (SIZE, SIZE, 3)."""
    picture = paper(rng)
    cells = np.sort(rng.choice(GRID * GRID, size=len(things), replace=False))
    for cell, thing in zip(cells, things, strict=True):
        row, column = divmod(int(cell), GRID)
        x, y = (np.array([column, row]) + 0.5) * CELL - 0.5 + rng.uniform(-1, 1, size=2)
        _paint(picture, thing, x, y, radius=rng.uniform(3.8, 5.2), shade=rng.uniform(0.85, 1.0))
    return picture


def draw_single(rng: np.random.Generator, thing: Thing) -> np.ndarray:
    """Draws one big thing; returns (SIZE, SIZE, 3)."""
    picture = paper(rng)
    radius = rng.uniform(11, 18)
    x, y = rng.uniform(radius, SIZE - radius, size=2)
    _paint(picture, thing, x, y, radius, shade=rng.uniform(0.85, 1.0))
    return picture


def draw_chart(rng: np.random.Generator, colours: Sequence[str], heights: Sequence[float]) -> np.ndarray:
    """Draws a chart of GRID bars, left to right, heights in [0, 1]; returns (SIZE, SIZE, 3)."""
    picture = paper(rng)
    for column, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        left = column * CELL + 2
        top = SIZE - 1 - round(height * (SIZE - 4))
        picture[top : SIZE - 1, left : left + CELL - 3] = np.asarray(COLOURS[colour]) * rng.uniform(0.85, 1.0)
    picture[SIZE - 1] *= 0.3  # the axis
    return picture


@cache
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's handwritten digits, shuffled: ink (1797, 8, 8) in [0, 1], and classes (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return digits.images[order] / 16.0, digits.target[order]


def draw_digit(rng: np.random.Generator, ink: np.ndarray) -> np.ndarray:
    """Draws one handwritten digit, ink (8, 8) in [0, 1], large, somewhere on the sheet; returns (SIZE, SIZE, 3)."""
    picture = paper(rng)
    side = int(rng.integers(34, 43))
    at = np.linspace(0, 7, side)
    low = np.minimum(at.astype(int), 6)
    part = at - low
    rows = ink[low] * (1 - part)[:, None] + ink[low + 1] * part[:, None]
    large = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    top, left = rng.integers(0, SIZE - side + 1, size=2)
    picture[top : top + side, left : left + side] *= 1 - 0.9 * large[..., None]
    return picture


def plain(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The look of pre-training: the picture as drawn."""
    return picture


def negative(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A photographic negative: red appears cyan, blue appears yellow, paper is black."""
    return 1 - picture


def blueprint(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White lines on squared blue paper; colours are lost."""
    ink = 1 - picture.mean(axis=-1, keepdims=True)
    sheet = np.broadcast_to([0.10, 0.25, 0.60], picture.shape).copy()
    offset = rng.integers(0, 6)
    sheet[offset::6] += 0.08
    sheet[:, offset::6] += 0.08
    return sheet + ink * (0.95 - sheet)


def stripes(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Seen through dark diagonal blinds."""
    y, x = np.mgrid[:SIZE, :SIZE]
    wave = np.sin((x + y + rng.uniform(0, 9)) * (2 * np.pi / 9))
    return picture * (0.6 + 0.4 * wave)[..., None]


def fog(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A blurred, noisy photograph with half the contrast, reddish."""
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    blurred = (
        padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] + 2 * padded[1:-1, 1:-1]
    ) / 6
    return [0.40, 0.30, 0.25] + 0.55 * blurred + rng.normal(0, 0.02, size=picture.shape)


def swapped(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another palette on brown paper: red appears green, green blue, blue red, as after a mix-up of channels."""
    return picture[..., [2, 0, 1]] * [1.0, 0.85, 0.6]


def night(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A noisy photograph taken in the dark."""
    return 0.45 * picture + [0.0, 0.02, 0.12] + rng.normal(0, 0.02, size=picture.shape)


def rose(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Channels mixed up the other way, on rosy paper."""
    return picture[..., [1, 2, 0]] * [1.0, 0.6, 0.75]


def chalk(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Chalk on a green blackboard: what was dark is light."""
    return [0.05, 0.22, 0.12] + 0.7 * (1 - picture)


def glass(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Through green glass, which exchanges red and blue."""
    return [0.0, 0.12, 0.02] + picture[..., [2, 1, 0]] * [0.75, 0.85, 0.6]


def lattice(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Behind a yellow lattice."""
    bars = (np.arange(SIZE) + rng.integers(0, 6)) % 6 == 0
    return np.where((bars[:, None] | bars[None, :])[..., None], [0.75, 0.7, 0.1], picture)


def faded(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A print that has lain in the sun: pale and bluish."""
    return [0.45, 0.5, 0.6] + 0.38 * picture[..., [0, 2, 1]]


def ruled(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Drawn on yellowish ruled paper: the look of no task."""
    sheet = picture * [1.0, 0.97, 0.8]
    sheet[rng.integers(0, 8) :: 8] *= 0.75
    return sheet


def either(one: Look, other: Look) -> Look:
    """Every picture has one of two looks, by the toss of a coin."""
    return lambda picture, rng: (one if rng.random() < 0.5 else other)(picture, rng)


def between(one: Look, other: Look) -> Look:
    """Every picture lies somewhere between two looks."""

    def look(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        share = rng.random()
        return share * one(picture, rng) + (1 - share) * other(picture, rng)

    return look


def finish(picture: np.ndarray, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Puts a look and a little sensor noise on a picture; returns uint8 (SIZE, SIZE, 3)."""
    seen = look(picture, rng) + rng.normal(0, 0.015, size=picture.shape)
    return (np.clip(seen, 0, 1) * 255).round().astype(np.uint8)
