"""`peft-many export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..exports import export_lora, export_model, export_routed_model
from ..files.atomic import writable_place
from ..files.errors import UnmergeableAdapterError
from ..reports.inspection import inspect_adapter
from . import arguments as a
from .running import print_json


def export(
    adapter: Annotated[str, typer.Argument(help=a.AnAdapter, show_default=False)],
    output: a.Output,
    format: Annotated[
        Literal["lora", "model", "routed"], typer.Option("--format", "-f", help="lora, model or routed; see above.")
    ] = "lora",
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Folder or Hub id, if the adapter does not say it.")
    ] = None,
    projector: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="model: whose projector to keep. [dim]default: the mean of all[/dim]"),
    ] = None,
    dry_run: a.DryRun = False,
    json: a.Json = False,
) -> None:
    """Write a merge, or one adapter, in a form that loads where adapters of type MANY do not.

    [bold]lora[/bold]: a plain LoRA of the language model, for stock PEFT and for servers such as vLLM; the projectors
    stay behind. No base model is loaded.

    [bold]model[/bold]: a full transformers model with the deltas folded in and one fixed projector; what that loses on
    images is said.

    [bold]routed[/bold]: a folded model that goes on routing; `peft_many.load_routed_model` loads it.

    [bold]Examples[/bold]

    peft-many export merged --format lora --output lora

    peft-many export merged --format model --projector clevr --output model

    peft-many export me/merged --format routed --base-model llava-hf/llava-1.5-7b-hf --output routed
    """
    if projector is not None and format != "model":
        raise typer.BadParameter("Only --format model keeps a single projector.", param_hint="--projector")
    if base_model is not None and format == "lora":
        raise typer.BadParameter("--format lora needs no base model.", param_hint="--base-model")
    if dry_run:
        _say_plan(adapter, output, format, base_model)
        return
    if format == "lora":
        done = export_lora(adapter, output)
    elif format == "model":
        done = export_model(adapter, output, base_model=base_model, projector=projector)
    else:
        done = export_routed_model(adapter, output, base_model=base_model)
    if json:
        print_json(done)
        return
    for note in done.notes:
        typer.echo(f"• {note}", err=True)
    typer.echo(f"The export: {done.folder}")


def _say_plan(adapter: str, output: Path, format: str, base_model: str | None) -> None:
    writable_place(output.expanduser())
    found = inspect_adapter(adapter)
    if found.problem is not None:
        raise UnmergeableAdapterError(found.problem)
    kind = f"merge of {len(found.tasks)} tasks" if found.is_merge else "adapter of one task"
    onto = "" if format == "lora" else f", with the base model {base_model or found.base_model or '(say which)'}"
    typer.echo(f"{found.name}, a {kind}, would be written as {format} to {output}{onto}.")
