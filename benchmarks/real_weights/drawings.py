"""Drawings of things, flags and icons as pictures with transparency: rendered from the packages' SVG files."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from .fetching import member
from .packages import EMOJI, FLAGS, GAME_ICONS, ROUND_FLAGS, Package

# No drawing of the second half is ever trained on, by the tasks or by the base model.
TRAIN_STYLES = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "emojione")
TEST_STYLES = ("twemoji", "openmoji")
_SIDE = 160  # pixels of a rendered drawing
_GROUPS = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")

# Photographs in scikit-image's and scikit-learn's packages (public domain, CC0, CC-BY; their READMEs say which).
_TRAIN_PHOTOGRAPHS = (
    ("skimage", "astronaut.png"),
    ("skimage", "brick.png"),
    ("skimage", "chelsea.png"),
    ("skimage", "coffee.png"),
    ("skimage", "grass.png"),
    ("skimage", "hubble_deep_field.jpg"),
    ("skimage", "motorcycle_left.png"),
    ("sklearn", "china.jpg"),
)
_TEST_PHOTOGRAPHS = (
    ("skimage", "gravel.png"),
    ("skimage", "ihc.png"),
    ("skimage", "rocket.jpg"),
    ("sklearn", "flower.jpg"),
)
_PHOTOGRAPH_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


@dataclass(frozen=True)
class Country:
    """A country as the package of flags has it."""

    code: str
    name: str
    capital: str
    continent: str


@dataclass(frozen=True)
class Drawings:
    """All drawings there are.

    Args:
        cache (`Path`): Where the packages are.
    """

    cache: Path

    def thing(self, style: str, name: str) -> Image.Image:
        """The emoji of that name."""
        return _icon(EMOJI[style], name, self.cache)

    def names(self, styles: Sequence[str]) -> set[str]:
        """Things, animals, plants, food and places that all of these styles have: no symbols, no people."""
        groups = json.loads(member(EMOJI["noto"], "package/metadata.json", self.cache).read_text(encoding="utf-8"))
        wanted = {name for group in _GROUPS for name in groups["categories"][group]}
        sets = (_icon_set(EMOJI[style], self.cache) for style in styles)
        return wanted.intersection(*({*found["icons"], *found.get("aliases", {})} for found in sets))

    def icon(self, name: str, colour: str) -> Image.Image:
        """A game icon in a colour that SVG knows."""
        return _icon(GAME_ICONS, name, self.cache, colour)

    def icon_names(self) -> list[str]:
        """All game icons, in alphabetical order."""
        return sorted(_icon_set(GAME_ICONS, self.cache)["icons"])

    def flag(self, code: str, shape: str) -> Image.Image:
        """A flag: `shape` is `"4x3"`, `"1x1"`, or `"round"`, which is drawn by another hand."""
        if shape == "round":
            return _icon(ROUND_FLAGS, code, self.cache)
        return _rendered(member(FLAGS, f"package/flags/{shape}/{code}.svg", self.cache).read_text(encoding="utf-8"))

    def countries(self) -> list[Country]:
        """Those with a code, a capital and a continent of their own."""
        listed = json.loads(member(FLAGS, "package/country.json", self.cache).read_text(encoding="utf-8"))
        whole = [entry for entry in listed if entry.get("iso") and entry.get("capital") and entry.get("continent")]
        return [Country(**{key: entry[key] for key in ("code", "name", "capital", "continent")}) for entry in whole]


@lru_cache
def photographs(split: str) -> tuple[Image.Image, ...]:
    """Photographs to draw upon: other ones for `"test"` than for anything else."""
    chosen = _TEST_PHOTOGRAPHS if split == "test" else _TRAIN_PHOTOGRAPHS
    return tuple(_opened(package, name) for package, name in chosen)


def _opened(package: str, name: str) -> Image.Image:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"Photographs come with {package}, which is not installed: pip install -e '.[real]'")
    with Image.open(Path(found.origin).parent / _PHOTOGRAPH_FOLDERS[package] / name) as image:
        return image.convert("RGB")


@lru_cache
def _icon_set(package: Package, cache: Path) -> dict[str, Any]:
    return json.loads(member(package, "package/icons.json", cache).read_text(encoding="utf-8"))


@lru_cache(maxsize=8192)
def _icon(package: Package, name: str, cache: Path, colour: str = "black") -> Image.Image:
    found = _icon_set(package, cache)
    icon = found["icons"][found["aliases"][name]["parent"] if name in found.get("aliases", {}) else name]
    width, height = (icon.get(side, found.get(side, 16)) for side in ("width", "height"))
    body = icon["body"].replace("currentColor", colour)
    start = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    return _rendered(f'{start}viewBox="0 0 {width} {height}" width="{width}" height="{height}">{body}</svg>')


@lru_cache(maxsize=1024)
def _rendered(svg: str) -> Image.Image:
    import resvg_py

    with Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=_SIDE)))) as image:
        return image.convert("RGBA")
