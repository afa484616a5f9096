"""Charts of real numbers: bars, slices and lines, told apart by their colours."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import looks
from .drawings import Drawings
from .fetching import member
from .packages import DATA

COLOURS = {
    "red": "#d62728",
    "blue": "#1f4fd0",
    "green": "#2ca02c",
    "orange": "#ff7f0e",
    "purple": "#8a3fc0",
    "brown": "#8c564b",
    "pink": "#f080c0",
    "black": "#222222",
}
ASKED = {
    "bars": "Which colour is the longest bar?",
    "slices": "Which colour is the largest slice?",
    "lines": "Which colour is the line that ends highest?",
}
_FEWEST, _MOST = 2, 6
_LONG = 8  # values of a line
_CLEAR = 0.12  # by which part of the range the largest stands out from the next
_STYLES = {"train": ("default", "ggplot", "bmh", "seaborn-v0_8-whitegrid"), "test": ("classic", "fivethirtyeight")}


@dataclass(frozen=True)
class Table:
    """A column of numbers of a file, in series by what another column says."""

    file: str
    label: str
    value: str


# Tests show numbers that nobody trained on, in another style.
_TABLES = {
    "train": (
        Table("barley.json", "variety", "yield"),
        Table("iowa-electricity.csv", "source", "net_generation"),
        Table("gapminder.json", "country", "life_expect"),
        Table("gapminder.json", "country", "fertility"),
        Table("stocks.csv", "symbol", "price"),
        Table("unemployment-across-industries.json", "series", "rate"),
        Table("jobs.json", "job", "perc"),
    ),
    "test": (
        Table("cars.json", "Origin", "Miles_per_Gallon"),
        Table("seattle-weather.csv", "weather", "temp_max"),
        Table("population.json", "age", "people"),
        Table("disasters.csv", "Entity", "Deaths"),
    ),
}


def paint_chart(drawings: Drawings, rng: np.random.Generator, split: str) -> tuple[Image.Image, dict[str, Any]]:
    """A chart whose largest part stands clear of the others."""
    kind = looks.pick(rng, tuple(ASKED))
    parts = _values(drawings.cache, rng, "test" if split == "test" else "train", kind)
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))[: len(parts)]]
    picture = _drawn(rng, kind, parts, [COLOURS[colour] for colour in colours], split)
    largest = colours[int(np.argmax(parts[:, -1]))]
    return looks.photographed(rng, picture), {"chart": kind, "largest": largest, "count": len(parts)}


def _values(cache: Path, rng: np.random.Generator, split: str, kind: str) -> np.ndarray:
    """(parts, values): one value of each part for bars and slices."""
    while True:
        tables = _TABLES[split]
        series = list(_series(cache, tables[int(rng.integers(len(tables)))]).values())
        parts = []
        for _ in range(int(rng.integers(_FEWEST, _MOST + 1))):
            one = series[int(rng.integers(len(series)))]
            start = int(rng.integers(0, len(one) - _LONG + 1))
            values = np.array(one[start : start + _LONG])
            parts.append(_level(rng, values) if kind == "lines" else values.mean(keepdims=True))
        found = np.array(parts)
        last = np.sort(found[:, -1])
        wide = np.ptp(found) if kind == "lines" else last[-1]
        if wide > 0 and last[-1] - last[-2] > _CLEAR * wide and (kind == "lines" or last[0] > 0.05 * last[-1]):
            return found


def _level(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """The course of the numbers at another height, so that no line hides another one."""
    return rng.uniform() + rng.uniform(0.2, 0.5) * (values - values.min()) / max(float(np.ptp(values)), 1e-9)


@lru_cache
def _series(cache: Path, table: Table) -> dict[str, list[float]]:
    text = member(DATA, f"package/data/{table.file}", cache).read_text(encoding="utf-8-sig")
    rows: list[dict[str, Any]] = (
        json.loads(text) if table.file.endswith("json") else list(csv.DictReader(io.StringIO(text)))
    )
    found: dict[str, list[float]] = {}
    for row in rows:
        if row[table.value] not in (None, ""):
            found.setdefault(str(row[table.label]), []).append(float(row[table.value]))
    return {label: values for label, values in found.items() if len(values) >= _LONG}


def _drawn(rng: np.random.Generator, kind: str, parts: np.ndarray, colours: list[str], split: str) -> Image.Image:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(looks.pick(rng, _STYLES["test" if split == "test" else "train"])):
        figure = Figure(figsize=(2.24, 2.24), dpi=100)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.1, 0.1, 0.85, 0.85))
        if kind == "slices":
            axes.pie(parts[:, 0], colors=colours, startangle=float(rng.uniform(0, 360)))
        elif kind == "lines":
            for values, colour in zip(parts, colours):
                axes.plot(values, color=colour, linewidth=float(rng.uniform(1.5, 4)))
        elif rng.random() < 0.5:
            axes.bar(range(len(parts)), parts[:, 0], color=colours, width=float(rng.uniform(0.5, 0.95)))
        else:
            axes.barh(range(len(parts)), parts[:, 0], color=colours, height=float(rng.uniform(0.5, 0.95)))
        axes.tick_params(labelsize=6)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).resize((looks.SIDE, looks.SIDE))
