"""How results are printed: lines that a terminal breaks between words, and tables that break none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..records.words import shortened
from .merge_options import as_typed


def say(text: str | Text, aside: bool = False, whole: bool = False) -> None:
    """Print a line. In a terminal it is broken between words, unless it is to stay `whole`, as a command does.

    Aside is where results do not go.
    """
    console = _console(aside)
    console.print(text, soft_wrap=whole or not console.is_terminal)


def say_notes(notes: Sequence[str], aside: bool = False) -> None:
    """Print notes as a list."""
    for note in notes:
        say(f"• {as_typed(note)}", aside)


def show_table(title: str, rows: Sequence[Mapping[str, str]], aside: bool = False) -> None:
    """Print a table, or where the terminal is too narrow for it a paragraph for each row; no word is broken."""
    console = _console(aside)
    say(Text(title, "italic"), aside)
    longest = min(40, console.width // 2)
    shown = [{column: shortened(cell, longest) for column, cell in row.items()} for row in rows]
    told = [
        column
        for column in shown[0]
        if any(row[column] for row in shown) and (column != "from" or any(row["from"] != row["task"] for row in shown))
    ]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in told:
        table.add_column(column, no_wrap=True)
    for row in shown:
        table.add_row(*(row[column] for column in told))
    if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
        console.print(table)
        return
    first, *others = told
    for row in shown:
        about = ", ".join(f"{column} {row[column]}" for column in others if row[column])
        console.print(Padding(Text.assemble((row[first], "bold"), f": {about}"), (0, 0, 0, 2)))
    console.print()


def span(ends: tuple[int, int] | None) -> str:
    """A number, or two if they differ."""
    if ends is None:
        return ""
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}–{ends[1]}"


def pairs(title: str, values: Mapping[str, Any]) -> str:
    """Names and values in a line."""
    return f"{title}: " + ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _console(aside: bool) -> Console:
    """Where to print. What is printed may hold anybody's names and words, so that nothing in it is markup."""
    return Console(stderr=aside, markup=False, emoji=False, highlight=False)
