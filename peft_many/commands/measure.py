"""`peft-many measure`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import arguments as a


def measure(
    adapter: Annotated[str, typer.Argument(help=a.AnAdapter, show_default=False)],
    data: Annotated[str, typer.Option("--data", "-d", help=f"Data of its task: {a.SomeData}", show_default=False)],
    output: a.Output,
    name: Annotated[str | None, typer.Option(help="What to call the task in merges.")] = None,
    base_model: a.Base = None,
    split: Annotated[str, typer.Option(help="Which part of a data set.")] = "train",
    images: a.Images = None,
    system: a.System = None,
    samples: Annotated[int, typer.Option(min=1, help="How many answers to measure on.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations in one forward pass.")] = 4,
    seed: Annotated[int, typer.Option(help="Fixes which rows are measured on.")] = 0,
    device: a.ModelDevice = None,
    load_in: a.LoadIn = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="A Hub repository that the adapter goes to as well.")
    ] = None,
    overwrite: a.Overwrite = False,
    quiet: a.Quiet = False,
) -> None:
    """Measure an adapter on data of its task, which merging it well needs: run its base model over some hundred
    samples, and write the adapter with its statistics.

    A plain LoRA is taken as it is. Data are rows of conversations or of questions with answers; any format that
    trainers read will do.

    [bold]Examples[/bold]

    peft-many measure me/clevr --data clevr.jsonl --output clevr-measured

    peft-many measure plain-lora --data me/iconqa --split train --name iconqa --output iconqa-measured

    peft-many measure me/clevr --data clevr.parquet --load-in 4bit --push me/clevr-measured --output clevr-measured
    """
    from .. import measure_adapter

    folder = measure_adapter(
        adapter,
        data,
        output,
        task_name=name,
        base_model=base_model,
        split=split,
        images=images,
        system=system,
        max_samples=samples,
        batch_size=batch_size,
        seed=seed,
        device=device,
        model_options=a.model_options(load_in),
        push_to=push,
        overwrite=overwrite,
        progress=not quiet,
    )
    typer.echo(f"The measured adapter: {folder}")
    if push is not None:
        typer.echo(f"On the Hub: {push}")
