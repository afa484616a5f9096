"""`peft-many plan` and `peft-many merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from . import arguments as a
from .merge_options import with_merge_options
from .running import FAILED, print_json


@with_merge_options
def plan(
    adapters: a.AdaptersUnlessRecipe = None,
    recipe: a.Recipe = None,
    weight: a.Weights = None,
    name: a.Names = None,
    without: a.Without = None,
    same_base: a.SameBase = False,
    device: a.Device = None,
    quiet: a.Quiet = False,
    json: a.Json = False,
    **options: Any,
) -> None:
    """Show what a merge would be: tasks, ranks, layers, sizes, mismatches, and where routing would send inputs.

    Nothing is written, but adapters on the Hub are downloaded to its cache. Exits with 1 if they cannot be merged.

    [bold]Examples[/bold]

    peft-many plan me/iconqa me/vizwiz@v2 clevr

    peft-many plan --recipe tasks.yaml --rank 64 --json
    """
    show(a.merge_arguments(adapters, recipe, weight, name, without, same_base, device, options), quiet, json)


@with_merge_options
def merge(
    output: a.Output,
    adapters: a.AdaptersUnlessRecipe = None,
    recipe: a.Recipe = None,
    weight: a.Weights = None,
    name: a.Names = None,
    without: a.Without = None,
    same_base: a.SameBase = False,
    device: a.Device = None,
    overwrite: a.Overwrite = False,
    dry_run: a.DryRun = False,
    quiet: a.Quiet = False,
    **options: Any,
) -> None:
    """Merge task adapters into one, without training and without a base model.

    Merges can be given too; the adapters that they were made of are not needed. One merge alone is made anew with
    other weights, ridge or rank. Options of ridge, gate and routing that are not given are taken from the merges, if
    these agree.

    [bold]Examples[/bold]

    peft-many merge me/iconqa me/vizwiz@v2 clevr --output merged

    peft-many merge me/iconqa my-lora --name my-lora=charts --output merged

    peft-many merge --recipe tasks.yaml --output merged --router gaussian

    peft-many merge merged --output merged-2 --weight clevr=2 [dim]# weighed anew[/dim]
    """
    from .. import merge_adapter_files
    from .tables import say

    arguments = a.merge_arguments(adapters, recipe, weight, name, without, same_base, device, options)
    if dry_run:
        show_without_writing(arguments, output, overwrite, quiet)
        return
    replaced = _in_place_of(output)
    folder = merge_adapter_files(**arguments, output_dir=output, overwrite=overwrite, progress=not quiet)
    if replaced:
        say(f"It was written {replaced}.", aside=True)
    say_merged(folder)


def show_without_writing(arguments: dict[str, Any], output: Path, overwrite: bool, quiet: bool) -> None:
    """Show what merging with these arguments would be and what it would replace, if it can be written there."""
    from ..merging.arguments import replaced_by_merge

    replaced_by_merge(output.expanduser(), overwrite, arguments["adapters"])
    show(arguments, quiet)
    replaced = _in_place_of(output)
    typer.echo(f"Nothing was written. The merge would be: {output}{replaced and f', {replaced}'}")


def _in_place_of(output: Path) -> str:
    """What a merge replaces, if anything."""
    from ..merging.arguments import merge_in
    from ..records.words import counted

    place = output.expanduser()
    if not (place / "adapter_config.json").is_file():
        return ""
    merge = merge_in(place)
    what = "the adapter" if merge is None else f"the merge of {counted(len(merge.tasks), 'task')}"
    return f"in place of {what} that was there"


def say_merged(folder: Path) -> None:
    """Say where a merge is, and before that what it costs, where images go, and what can be done next."""
    from peft import PeftConfig

    from ..records import merge_of
    from .display import show_merged

    merge = merge_of(PeftConfig.from_pretrained(str(folder)))
    if merge is not None:
        show_merged(merge, str(folder))
    typer.echo(f"The merge: {folder}")


def show(arguments: dict[str, Any], quiet: bool, json: bool = False) -> None:
    """Show what merging with these arguments would be, and exit with an error if it cannot be done."""
    from .. import plan_merge
    from .display import show_plan

    found = plan_merge(**arguments, progress=not quiet)
    if json:
        print_json(found)
    else:
        show_plan(found)
    if found.problems:
        raise typer.Exit(FAILED)
