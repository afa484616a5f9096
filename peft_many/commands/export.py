"""`peft-many export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import arguments as a
from .running import WRONG_USAGE, print_json, say_error

# What to choose from, of adapters with projectors of their own.
_ROUTED = {
    "routed": "keeps all projectors; loads only with peft_many",
    "lora": "for stock PEFT and servers; right on text, mostly wrong about images, except in vLLM\n"
    "  with peft_many installed, which takes the projectors from the merge (--additional-config)",
    "model --projector {task}": "for plain transformers; right on text and about that task's images, mostly wrong "
    "about others",
}
_NOT_ROUTED = {
    "model": "for plain transformers; keeps the projector",
    "lora": "for stock PEFT and servers; right on text, mostly wrong about images",
}


def export(
    adapter: a.Adapter,
    output: a.Output,
    format: Annotated[
        Literal["lora", "model", "routed"] | None,
        typer.Option(
            "--format",
            "-f",
            help="lora, model or routed; see above. Required if tasks trained projectors. [dim]default: lora[/dim]",
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="Folder or Hub id of the base model, if the adapter does not name it."),
    ] = None,
    projector: Annotated[
        str | None,
        typer.Option(
            metavar="TASK", help="model: the task whose projector to keep. [dim]default: the mean of all[/dim]"
        ),
    ] = None,
    with_tasks: Annotated[
        bool, typer.Option("--with-tasks", help="lora: also write each task's own LoRA, in a subfolder.")
    ] = False,
    check_for: Annotated[
        Literal["vllm"] | None,
        typer.Option("--check-for", help="lora: check that this server loads every layer, each in its own rank."),
    ] = None,
    dry_run: a.DryRun = False,
    quiet: a.Quiet = False,
    json: a.Json = False,
) -> None:
    """Convert a merge, or one adapter, to a plain LoRA or to a full model.

    [bold]routed[/bold]: a full model that still routes images, so that nothing is lost. Load it by
    `peft_many.load_routed_model`.

    [bold]lora[/bold]: a plain LoRA of the language model, for stock PEFT and for servers such as vLLM. Projectors are
    left out: answers on text are the merge's, most answers about images will be wrong. No base model is loaded.
    --with-tasks adds the tasks' own LoRAs, for a server that chooses among them by the image.

    [bold]model[/bold]: a full transformers model with the LoRA folded in and one fixed projector, for anything that
    loads the base model: that of the task in --projector, whose answers about its images are then the merge's, or the
    mean of all. Answers on text are the merge's, most answers about other images will be wrong.

    [bold]Examples[/bold]

    peft-many export merged --format lora --check-for vllm --output lora

    peft-many export merged --format model --projector clevr --output model

    peft-many export merged --format routed --base-model me/llava --output routed
    """
    chosen = format or _only_format(adapter, output)
    if projector is not None and chosen != "model":
        raise typer.BadParameter("Only --format model keeps a single projector.", param_hint="--projector")
    if with_tasks and chosen != "lora":
        raise typer.BadParameter("Only --format lora writes the tasks' own LoRAs.", param_hint="--with-tasks")
    if check_for is not None and chosen != "lora":
        raise typer.BadParameter("Only --format lora is checked.", param_hint="--check-for")
    if base_model is not None and chosen == "lora" and check_for is None:
        raise typer.BadParameter("--format lora needs no base model.", param_hint="--base-model")
    from .. import export_lora, export_model, export_routed_model
    from .tables import say_notes

    given: dict[str, Any] = {"base_model": base_model, "dry_run": dry_run}
    if chosen == "lora":
        done = export_lora(adapter, output, with_tasks=with_tasks, check_for=check_for, **given)
    elif chosen == "model":
        done = export_model(adapter, output, projector=projector, **given)
    else:
        done = export_routed_model(adapter, output, **given)
    if json:
        print_json(done)
        return
    say_notes(done.notes, aside=True)
    typer.echo(f"{'Nothing was written. The export would be' if dry_run else 'The export'}: {done.folder}")


def _only_format(adapter: str, output: Path) -> str:
    """What an adapter without projectors of its own is exported as; of others the user must say what they give up."""
    from .. import inspect_adapter

    found = inspect_adapter(adapter)
    if not any(task.projectors for task in found.tasks):
        return "lora"
    command = f"peft-many export {shlex.quote(adapter)} --output {shlex.quote(str(output))} --format"
    task = shlex.quote(found.tasks[0].name)
    formats = (_ROUTED if found.routing else _NOT_ROUTED).items()
    say_error(
        f"{adapter} has projectors that were trained, and formats differ in what happens to them. Choose one:\n"
        + "\n".join(f"{command} {format.format(task=task)}\n  {what}" for format, what in formats)
    )
    raise typer.Exit(WRONG_USAGE)
