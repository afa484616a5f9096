"""`peft-many inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..reports.inspection import inspect_adapter
from . import arguments as a
from .display import show_inspection
from .running import print_json


def inspect(
    adapter: Annotated[str, typer.Argument(help=a.AnAdapter, show_default=False)],
    json: a.Json = False,
) -> None:
    """Show what is in an adapter or a merge: tasks and where they come from, sizes, statistics, routing, gate.

    [bold]Examples[/bold]

    peft-many inspect merged

    peft-many inspect me/iconqa@v2 --json
    """
    found = inspect_adapter(adapter)
    if json:
        print_json(found)
    else:
        show_inspection(found)
