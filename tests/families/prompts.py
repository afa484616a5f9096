"""How processors lay out the placeholder tokens of an image, and of the tiles that it is cut into."""

from __future__ import annotations

from collections.abc import Callable

# Tokens that stand around images; nothing else has these ids.
START, END, TILE, BREAK, FENCE, WHOLE, ROW = range(100, 107)
SLICE, SLICE_END = 120, 121


def run(tiles: list[list[int]], end: int) -> list[int]:
    """InternVL and most others: all in one run."""
    return [START, *[token for tile in tiles for token in tile], end]


def marked(tiles: list[list[int]], end: int) -> list[int]:
    """Aya: a marker before each tile."""
    return [START, *[token for tile in tiles for token in (TILE, *tile)], end]


def fenced(tiles: list[list[int]], end: int) -> list[int]:
    """Idefics2: a fence before each tile; the one that closes an image is the one that opens the next."""
    return [token for tile in tiles for token in (FENCE, *tile)]


def parted(tiles: list[list[int]], end: int) -> list[int]:
    """Ovis 2: the whole first, and a token between all of them."""
    return [START, *[token for tile in tiles for token in (*tile, TILE)][:-1], end]


def sliced(tiles: list[list[int]], end: int) -> list[int]:
    """MiniCPM-V: the whole first; slices have brackets of their own, and a line break after each row."""
    whole, *slices = tiles
    ids = [token for one in slices for token in (SLICE, *one, SLICE_END, BREAK)][:-1]
    return [START, *whole, end, *ids]


def rows(tiles: list[list[int]], end: int) -> list[int]:
    """Idefics3: a fence and a marker before each tile, a line break after each row of tiles, and the whole last."""
    *cut, whole = tiles
    ids = [token for i, tile in enumerate(cut) for token in (FENCE, ROW + i, *tile)]
    return [*ids, *([BREAK, BREAK] if cut else []), FENCE, WHOLE, *whole, FENCE]


def ended(tiles: list[list[int]], end: int) -> list[int]:
    """Llama 4: a token between tiles, two before the whole, and a known one at the end."""
    *cut, whole = tiles
    return [START, *[token for tile in cut for token in (*tile, TILE)], *([WHOLE] if cut else []), *whole, end]


PROMPTS: dict[str, Callable[[list[list[int]], int], list[int]]] = {
    "run": run,
    "marked": marked,
    "fenced": fenced,
    "parted": parted,
    "sliced": sliced,
    "rows": rows,
    "ended": ended,
}
