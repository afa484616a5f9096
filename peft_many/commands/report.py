"""`peft-many report`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..reports.report import merge_report, save_report
from . import arguments as a
from .display import show_report


def report(
    merge: Annotated[str, typer.Argument(help="The folder or Hub id of a merge.", show_default=False)],
    output: a.Output,
    conflicts: Annotated[
        bool, typer.Option("--conflicts/--no-conflicts", help="Find the tasks that contradict each other.")
    ] = True,
    quiet: a.Quiet = False,
) -> None:
    """Say what a merge costs each task, layer by layer, before any evaluation: an HTML page, a PNG and JSON.

    [bold]Examples[/bold]

    peft-many report merged --output merged-report

    peft-many report me/merged --output merged-report --no-conflicts [dim]# in half the time[/dim]
    """
    found = merge_report(merge, conflicts=conflicts, progress=not quiet)
    page = save_report(found, output)
    show_report(found)
    typer.echo(f"The report: {page}")
