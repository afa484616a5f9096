"""What makes pictures varied: backgrounds, where and how drawings lie on them, and the camera that takes them."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from .drawings import photographs

SIDE = 224  # pixels
Box = tuple[float, float, float, float]  # left, top, right, bottom, in parts of the picture


def background(rng: np.random.Generator, split: str, photograph: bool | None = None) -> Image.Image:
    """A plain colour, a gradient, a pattern, or a part of a photograph.

    Args:
        rng (`np.random.Generator`): Draws it.
        split (`str`): `"test"` has other photographs.
        photograph (`bool`, *optional*): Whether it is one; mostly not if not given.
    """
    if photograph or (photograph is None and rng.random() < 0.2):
        return _part_of_photograph(rng, split)
    first, second = _pale(rng), _pale(rng)
    kind = rng.choice(3, p=[0.5, 0.25, 0.25])
    if kind == 0:
        return Image.new("RGB", (SIDE, SIDE), tuple(first))
    if kind == 1:
        mask = Image.linear_gradient("L").rotate(90 * int(rng.integers(4))).resize((SIDE, SIDE))
        return Image.composite(*(Image.new("RGB", (SIDE, SIDE), tuple(c)) for c in (first, second)), mask)
    return _pattern(rng, tuple(first), tuple((first.astype(int) * 3 + second) // 4))


def place(rng: np.random.Generator, picture: Image.Image, drawing: Image.Image, box: Box, turn: float = 15) -> None:
    """Put a drawing somewhere into a box of the picture, smaller, turned, and in slightly other colours.

    Args:
        rng (`np.random.Generator`): Draws how.
        picture (`Image.Image`): Is changed.
        drawing (`Image.Image`): With transparency.
        box (`Box`): Where.
        turn (`float`): By how many degrees at most.
    """
    left, top, right, bottom = (round(SIDE * part) for part in box)
    turned = drawing.rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR, expand=True)
    share = rng.uniform(0.75, 1.0) * min((right - left) / turned.width, (bottom - top) / turned.height)
    size = (max(1, round(turned.width * share)), max(1, round(turned.height * share)))
    small = _recoloured(rng, turned.resize(size, Image.Resampling.BILINEAR))
    spot = (
        left + int(rng.integers(0, max(1, right - left - size[0]))),
        top + int(rng.integers(0, max(1, bottom - top - size[1]))),
    )
    picture.paste(small, spot, small)


def photographed(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """As a camera might have it: other light and colours, a little out of focus, grainy, or cut at the edges."""
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = kind(picture).enhance(rng.uniform(0.75, 1.25))
    if rng.random() < 0.5:
        edge = rng.uniform(0, 0.06 * SIDE, size=4)
        picture = picture.resize(
            (SIDE, SIDE), Image.Resampling.BILINEAR, (edge[0], edge[1], SIDE - edge[2], SIDE - edge[3])
        )
    if rng.random() < 0.25:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    if rng.random() < 0.25:
        grain = rng.normal(0, rng.uniform(2, 10), size=(SIDE, SIDE, 3))
        picture = Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
    return picture


def jpeg(rng: np.random.Generator, picture: Image.Image) -> bytes:
    """As a file."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(rng.integers(70, 95)))
    return file.getvalue()


def grid(rng: np.random.Generator, count: int) -> list[Box]:
    """`count` boxes that do not overlap, of nine."""
    cells = rng.permutation(9)[:count]
    return [((c % 3) / 3, (c // 3) / 3, (c % 3 + 1) / 3, (c // 3 + 1) / 3) for c in cells.tolist()]


def pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    """One of them."""
    return choices[int(rng.integers(len(choices)))]


def _pale(rng: np.random.Generator) -> np.ndarray:
    """A colour that drawings stand out from."""
    low = int(rng.choice([120, 200, 235], p=[0.2, 0.4, 0.4]))
    return rng.integers(low, 256, size=3).astype(np.uint8)


def _pattern(rng: np.random.Generator, ground: tuple[int, ...], ink: tuple[int, ...]) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), ground)
    draw = ImageDraw.Draw(picture)
    step, wide = int(rng.integers(12, 40)), int(rng.integers(2, 10))
    dots = rng.random() < 0.5
    for x in range(0, SIDE, step):
        if not dots:
            draw.rectangle((x, 0, x + wide, SIDE), fill=ink)
        for y in range(0, SIDE if dots else 0, step):
            draw.ellipse((x, y, x + wide, y + wide), fill=ink)
    return picture.rotate(90 * int(rng.integers(2)))


def _part_of_photograph(rng: np.random.Generator, split: str) -> Image.Image:
    every = photographs(split)
    whole = every[int(rng.integers(len(every)))]
    side = rng.uniform(0.4, 1.0) * min(whole.size)
    left, top = rng.uniform(0, whole.width - side), rng.uniform(0, whole.height - side)
    part = whole.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def _recoloured(rng: np.random.Generator, drawing: Image.Image) -> Image.Image:
    alpha = drawing.getchannel("A")
    plain = drawing.convert("RGB")
    plain = ImageEnhance.Color(plain).enhance(rng.uniform(0.6, 1.3))
    plain = ImageEnhance.Brightness(plain).enhance(rng.uniform(0.8, 1.15))
    plain.putalpha(alpha)
    return plain
