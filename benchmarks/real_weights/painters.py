"""How the pictures of emoji, flags and icons are painted, each with the facts that may be asked of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from . import looks
from .drawings import TEST_STYLES, TRAIN_STYLES, Drawings
from .things import COUNTRIES, GROUP_OF, scenery, word

# A picture, and what is known of it.
Painted = tuple[Image.Image, dict[str, Any]]
INKS = {
    "black": "#202020",
    "red": "#d02020",
    "green": "#20902c",
    "blue": "#2050d0",
    "orange": "#f08010",
    "purple": "#8030b0",
    "brown": "#804818",
}
RELATIONS = ("above", "below", "to the left of", "to the right of")
_MOST_ICONS = 6


@dataclass(frozen=True)
class Kind:
    """Pictures of one kind, which several tasks may ask about.

    Args:
        name (`str`): Names its folder.
        stream (`int`): Keeps its random draws apart from those of other kinds.
        paint (`Callable`): Draws one picture for a split, `"train"` or `"test"`.
    """

    name: str
    stream: int
    paint: Callable[[Drawings, np.random.Generator, str], Painted]


def style(rng: np.random.Generator, split: str) -> str:
    """The hand that draws: another one in tests than in training."""
    return looks.pick(rng, TEST_STYLES if split == "test" else TRAIN_STYLES)


def paint_thing(drawings: Drawings, rng: np.random.Generator, split: str) -> Painted:
    """One thing, somewhere on some background."""
    picture = looks.background(rng, split)
    name = looks.pick(rng, tuple(GROUP_OF))
    drawing = drawings.thing(style(rng, split), name)
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    looks.place(rng, picture, drawing, (0.05, 0.05, 0.95, 0.95))
    return looks.photographed(rng, picture), {"thing": word(name), "group": GROUP_OF[name]}


def paint_flag(drawings: Drawings, rng: np.random.Generator, split: str) -> Painted:
    """A flag: whole, cut to a circle, or waving; in tests from the set of round flags."""
    every = {country.code: country for country in drawings.countries()}
    country = every[looks.pick(rng, COUNTRIES)]
    shape = "round" if split == "test" else looks.pick(rng, ("4x3", "1x1"))
    flag = drawings.flag(country.code, shape)
    if split != "test" and rng.random() < 0.5:
        flag = _waving(rng, flag) if rng.random() < 0.5 else _round(flag)
    picture = looks.background(rng, split)
    looks.place(rng, picture, flag, (0.02, 0.02, 0.98, 0.98), turn=10)
    facts = {"country": country.name, "capital": country.capital, "continent": country.continent}
    return looks.photographed(rng, picture), facts


def paint_icons(drawings: Drawings, rng: np.random.Generator, split: str) -> Painted:
    """The same icon a few times; tests have icons that nobody trained on."""
    names = drawings.icon_names()
    own = names[::4] if split == "test" else [name for i, name in enumerate(names) if i % 4]
    count = int(rng.integers(1, _MOST_ICONS + 1))
    colour = looks.pick(rng, tuple(INKS))
    icon = drawings.icon(looks.pick(rng, own), INKS[colour])
    picture = looks.background(rng, split, photograph=False)
    for box in looks.grid(rng, count):
        looks.place(rng, picture, icon, box)
    return looks.photographed(rng, picture), {"count": count, "colour": colour, "most": _MOST_ICONS}


def paint_scene(drawings: Drawings, rng: np.random.Generator, split: str) -> Painted:
    """Two things on a photograph, one above or beside the other."""
    picture = looks.background(rng, split, photograph=True)
    names = [str(name) for name in rng.permutation(scenery())[:2]]
    return _related(drawings, rng, split, picture, names)


def paint_anything(drawings: Drawings, rng: np.random.Generator, split: str) -> Painted:
    """For captions: one thing, several of it, or two things, out of all that there are."""
    names = anything(drawings)
    picture = looks.background(rng, split)
    kind = rng.choice(3, p=[0.5, 0.15, 0.35])
    if kind == 2:
        return _related(drawings, rng, split, picture, [looks.pick(rng, names), looks.pick(rng, names)])
    name = looks.pick(rng, names)
    drawing = drawings.thing(style(rng, split), name)
    boxes = looks.grid(rng, int(rng.integers(2, 6))) if kind == 1 else [(0.05, 0.05, 0.95, 0.95)]
    for box in boxes:
        looks.place(rng, picture, drawing, box)
    return looks.photographed(rng, picture), {"things": [word(name)], "count": len(boxes)}


def anything(drawings: Drawings) -> tuple[str, ...]:
    """Names of the things that all styles draw, but for those that only differ in small ways."""
    without = ("face", "clock", "oclock", "thirty", "arrow", "moon", "speaker", "mailbox", "suit", "medal", "yen")
    shared = drawings.names((*TRAIN_STYLES, *TEST_STYLES))
    return tuple(name for name in sorted(shared) if not set(without) & set(name.split("-")))


def _related(
    drawings: Drawings, rng: np.random.Generator, split: str, picture: Image.Image, names: list[str]
) -> Painted:
    relation = looks.pick(rng, RELATIONS)
    halves = ((0.1, 0.02, 0.9, 0.5), (0.1, 0.5, 0.9, 0.98))
    if "left" in relation or "right" in relation:
        halves = ((0.02, 0.1, 0.5, 0.9), (0.5, 0.1, 0.98, 0.9))
    placed = names if relation in ("above", "to the left of") else names[::-1]
    for name, box in zip(placed, halves):
        looks.place(rng, picture, drawings.thing(style(rng, split), name), box)
    return looks.photographed(rng, picture), {
        "things": [word(name) for name in names],
        "relation": relation,
        "count": 1,
    }


def _round(flag: Image.Image) -> Image.Image:
    side = min(flag.size)
    left, top = (flag.width - side) // 2, (flag.height - side) // 2
    mask = Image.new("L", flag.size, 0)
    ImageDraw.Draw(mask).ellipse((left, top, left + side, top + side), fill=255)
    cut = flag.copy()
    cut.putalpha(mask)
    return cut.crop((left, top, left + side, top + side))


def _waving(rng: np.random.Generator, flag: Image.Image) -> Image.Image:
    """Columns moved up and down by a sine, darker where it falls."""
    pixels = np.asarray(flag).copy()
    height, width, _ = pixels.shape
    phase = np.linspace(0, rng.uniform(4, 10), width) + rng.uniform(0, 6)
    high = rng.uniform(0.02, 0.06) * height
    moved = np.zeros((height + 2 * int(high) + 2, width, 4), np.uint8)
    light = 1 - 0.15 * (1 + np.cos(phase))
    for x in range(width):
        top = int(high * (1 + np.sin(phase[x])))
        moved[top : top + height, x, :3] = pixels[:, x, :3] * light[x]
        moved[top : top + height, x, 3] = pixels[:, x, 3]
    return Image.fromarray(moved)
