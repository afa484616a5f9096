"""`peft-many inspect` and `peft-many report`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import arguments as a
from .running import print_json


def inspect(
    adapter: a.Adapter,
    json: a.Json = False,
) -> None:
    """Show what is in an adapter or a merge: tasks and where they come from, sizes, statistics, routing, gate.

    [bold]Examples[/bold]

    peft-many inspect merged

    peft-many inspect me/iconqa@v2 --json
    """
    from .. import inspect_adapter
    from .display import show_inspection

    found = inspect_adapter(adapter)
    if json:
        print_json(found)
    else:
        show_inspection(found)


def report(
    merge: a.Merge,
    output: a.Output,
    conflicts: Annotated[
        bool,
        typer.Option(
            "--conflicts/--no-conflicts", help="Find tasks that contradict each other; takes half of the time."
        ),
    ] = True,
    device: a.Device = None,
    overwrite: a.Replace = False,
    quiet: a.Quiet = False,
) -> None:
    """Report how much merging changes each task's LoRA, layer by layer: an HTML page, a PNG and JSON. No model is run.

    [bold]Examples[/bold]

    peft-many report merged --output merged-report

    peft-many report me/merged -o report --no-conflicts [dim]# in half the time[/dim]
    """
    from .. import merge_report, save_report
    from ..reports.report import check_report_folder
    from .display import show_report

    check_report_folder(output, overwrite, merge)  # now, and not when all is computed
    found = merge_report(merge, conflicts=conflicts, device=device or "cpu", progress=not quiet)
    page = save_report(found, output, overwrite=overwrite)
    show_report(found)
    typer.echo(f"The report: {page}")
