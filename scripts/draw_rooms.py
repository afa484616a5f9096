"""Draws docs/architecture.svg: the rooms of the package on their floors, and what imports what.

    python scripts/draw_rooms.py

The floors are those of the import contract in setup.cfg, the arrows are the imports themselves, and the sentences are
the first of each room's `__init__`.
"""

from __future__ import annotations

import ast
import configparser
import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import grimp
import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
WIDTH, HEIGHT, STOREY = 12.0, 0.62, 1.05  # of a floor, of a box, from floor to floor
COLOURS = (
    "#1f5fa8", "#c25a00", "#1f7a3a", "#b3261e", "#6a3fa0", "#7a4b2a", "#b03a8c", "#4d4d4d", "#7a7a00", "#00788a",
    "#375a9e", "#a0522d", "#2f6f5f", "#8a2f4f",
)  # fmt: skip
Boxes = Mapping[str, tuple[float, float, float]]  # left end, right end, bottom


def floors() -> list[list[str]]:
    """The rooms of each floor, from the highest down, as setup.cfg has them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["importlinter:contract:floors"]["layers"].split("\n")
    named = [re.findall(r"\w+", line) for line in lines]
    # Single modules are no rooms.
    built = [[room for room in floor if (ROOT / "peft_many" / room).is_dir()] for floor in named]
    return [floor for floor in built if floor]


def imports() -> Counter[tuple[str, str]]:
    """How many imports there are from each room to each other one."""
    graph = grimp.build_graph("peft_many", cache_dir=None)
    found: Counter[tuple[str, str]] = Counter()
    for importer in sorted(graph.modules):  # so that the same imports draw the same file
        for imported in sorted(graph.find_modules_directly_imported_by(importer)):
            pair = tuple([*module.split("."), ""][1] for module in (importer, imported))
            if pair[0] != pair[1]:
                found[pair] += 1
    return found


def about(room: str) -> str:
    """What a room says of itself in one sentence."""
    text = ast.get_docstring(ast.parse((ROOT / "peft_many" / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", " ".join(text.split()))[0].replace("`", "")


def place(storeys: Sequence[Sequence[str]]) -> Boxes:
    """Where each room's box is; the rooms of a floor share its width."""
    boxes = {}
    for number, floor in enumerate(storeys):
        part = WIDTH / len(floor)
        for i, room in enumerate(floor):
            boxes[room] = (i * part + 0.06, (i + 1) * part - 0.06, -number * STOREY)
    return boxes


def draw_boxes(axes: Axes, boxes: Boxes, colours: Mapping[str, str]) -> None:
    for room, (left, right, bottom) in boxes.items():
        shape = FancyBboxPatch(
            (left, bottom), right - left, HEIGHT, boxstyle="round,pad=0,rounding_size=0.06", zorder=3
        )
        shape.set(facecolor="white", edgecolor=colours[room], linewidth=1.6)
        axes.add_patch(shape)
        wide = int((right - left) * 15.5)
        lines = textwrap.wrap(about(room), wide, max_lines=3, placeholder=" …")
        at = bottom + HEIGHT - 0.1
        axes.text(left + 0.12, at, room, weight="bold", size=9, va="top", color=colours[room], zorder=4)
        axes.text(left + 0.12, at - 0.19, "\n".join(lines), size=6.2, va="top", zorder=4, linespacing=1.15)


def draw_arrows(axes: Axes, boxes: Boxes, found: Mapping[tuple[str, str], int], colours: Mapping[str, str]) -> None:
    """From the lower edge of who imports to the upper edge of what is imported, side by side and not across."""
    pairs = [pair for pair in found if pair[0] in boxes and pair[1] in boxes]

    def ends(room: str, side: int) -> dict[tuple[str, str], float]:
        mine = [pair for pair in pairs if pair[side] == room]
        # By the direction to the other end, so that arrows of one box do not cross.
        mine.sort(key=lambda pair: _slope(boxes[pair[side]], boxes[pair[1 - side]]))
        left, right, _ = boxes[room]
        return {pair: left + (i + 1) * (right - left) / (len(mine) + 1) for i, pair in enumerate(mine)}

    start = {pair: x for room in boxes for pair, x in ends(room, 0).items()}
    end = {pair: x for room in boxes for pair, x in ends(room, 1).items()}
    for pair in pairs:
        upward = boxes[pair[0]][2] < boxes[pair[1]][2]
        axes.annotate(
            "",
            xy=(end[pair], boxes[pair[1]][2] + (0 if upward else HEIGHT)),
            xytext=(start[pair], boxes[pair[0]][2] + (HEIGHT if upward else 0)),
            arrowprops={
                "arrowstyle": "-|>",
                "color": "red" if upward else colours[pair[0]],
                "linewidth": 0.5 + 0.09 * min(found[pair], 20),
                "alpha": 0.75,
                "shrinkA": 0,
                "shrinkB": 0,
                "mutation_scale": 7,
            },
            zorder=2,
        )


def _slope(here: tuple[float, float, float], there: tuple[float, float, float]) -> float:
    return (there[0] + there[1] - here[0] - here[1]) / max(abs(here[2] - there[2]), 1e-9)


def main() -> None:
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rooms", "font.family": "DejaVu Sans"})
    storeys = floors()
    boxes = place(storeys)
    colours = dict(zip(boxes, itertools.cycle(COLOURS)))
    figure, axes = plt.subplots(figsize=(WIDTH * 0.85, (len(storeys) * STOREY + 0.2) * 0.85), layout="constrained")
    draw_arrows(axes, boxes, imports(), colours)
    draw_boxes(axes, boxes, colours)
    axes.set_xlim(-0.1, WIDTH + 0.1)
    axes.set_ylim(-(len(storeys) - 1) * STOREY - 0.1, HEIGHT + 0.1)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
