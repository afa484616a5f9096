"""Solids on a floor: cubes, spheres and cylinders, shaded in training and outlined in tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from . import looks
from .drawings import Drawings

COLOURS = {
    "red": (205, 40, 40),
    "blue": (45, 85, 210),
    "green": (40, 150, 60),
    "yellow": (235, 205, 50),
    "purple": (140, 60, 180),
    "gray": (130, 130, 130),
}
SHAPES = ("cube", "sphere", "cylinder")
_FEWEST, _MOST = 3, 6
_SIDE = 96  # pixels of a drawn solid


def paint_solids(drawings: Drawings, rng: np.random.Generator, split: str) -> tuple[Image.Image, dict[str, Any]]:
    """A few solids, no two in the same place."""
    picture = looks.background(rng, split, photograph=False)
    count = int(rng.integers(_FEWEST, _MOST + 1))
    palette = [str(colour) for colour in rng.permutation(list(COLOURS))[:3]]  # so that some have the same colour
    solids = []
    for box in looks.grid(rng, count):
        colour, shape = looks.pick(rng, palette), looks.pick(rng, SHAPES)
        jittered = np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, size=3), 0, 255)
        looks.place(rng, picture, _solid(rng, shape, jittered, split == "test"), box, turn=6)
        solids.append((colour, shape))
    return looks.photographed(rng, picture), {"solids": solids}


def _solid(rng: np.random.Generator, shape: str, colour: np.ndarray, outlined: bool) -> Image.Image:
    """One solid with its shadow and transparency around it."""
    canvas = Image.new("RGBA", (_SIDE, _SIDE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    if not outlined:
        draw.ellipse((8, 76, 92, 94), fill=(0, 0, 0, 90))
        canvas = canvas.filter(ImageFilter.GaussianBlur(3))
        draw = ImageDraw.Draw(canvas)
    deep = rng.uniform(0.55, 0.75)
    line: dict[str, Any] = {"outline": (15, 15, 15, 255), "width": 3} if outlined else {}
    light, middle, dark = (tuple((colour * part).astype(int)) for part in (1.0, (1 + deep) / 2, deep))
    if shape == "cube":
        front, top = [(14, 36), (66, 36), (66, 88), (14, 88)], [(14, 36), (32, 18), (84, 18), (66, 36)]
        draw.polygon(front, fill=middle, **line)
        draw.polygon(top, fill=light, **line)
        draw.polygon([(66, 36), (84, 18), (84, 70), (66, 88)], fill=dark, **line)
    elif shape == "cylinder":
        draw.ellipse((22, 70, 74, 90), fill=middle, **line)
        draw.rectangle((22, 24, 74, 80), fill=middle)
        draw.rectangle((58, 24, 74, 80), fill=dark)
        if outlined:
            draw.line([(22, 24), (22, 80)], fill=line["outline"], width=3)
            draw.line([(74, 24), (74, 80)], fill=line["outline"], width=3)
        draw.ellipse((22, 14, 74, 34), fill=light, **line)
    else:
        draw.ellipse((14, 18, 82, 88), fill=dark, **line)
        for step in range(0 if outlined else 12):
            shade = deep + (1 - deep) * step / 11
            inset = 2.6 * step
            draw.ellipse(
                (15 + inset * 0.7, 19 + inset * 0.6, 81 - inset * 1.3, 87 - inset * 1.4), fill=_scaled(colour, shade)
            )
        if outlined:
            draw.ellipse((28, 28, 44, 44), fill=light)
    return canvas


def _scaled(colour: np.ndarray, shade: float) -> tuple[int, ...]:
    return tuple(int(part) for part in colour * shade)
