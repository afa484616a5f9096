"""`peft-many measure`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import arguments as a


def measure(
    adapter: a.Adapter,
    data: Annotated[str, typer.Option("--data", "-d", help=f"Data of its task: {a.SomeData}", show_default=False)],
    output: a.Output,
    name: Annotated[str | None, typer.Option(help="The name of the task in merges.")] = None,
    base_model: a.Base = None,
    split: a.TrainSplit = None,
    images: a.Images = None,
    system: a.System = None,
    samples: Annotated[int, typer.Option(min=1, help="The number of answers to measure on.")] = 256,
    keep_prompts: Annotated[
        int, typer.Option(min=0, help="Keep this many prompts, word for word, so that merges can be refitted later.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations per batch.")] = 4,
    seed: Annotated[int, typer.Option(help="The random seed that chooses the rows.")] = 0,
    device: a.ModelDevice = None,
    load_in: a.LoadIn = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO_ID",
            help="Also push the measured adapter to this Hub repository; if there is none, a public one is created.",
        ),
    ] = None,
    overwrite: a.Overwrite = False,
    quiet: a.Quiet = False,
) -> None:
    """Measure an adapter on data of its task, and write a copy with these statistics, which merging uses.

    Runs the base model over a few hundred samples. Plain LoRA adapters can be measured too. Data are rows of
    conversations, or of questions with answers, in the formats that trainers read.

    [bold]Examples[/bold]

    peft-many measure me/clevr --data clevr.jsonl --output clevr-measured

    peft-many measure plain-lora --data me/iconqa --name iconqa --output measured

    peft-many measure me/clevr --data clevr.parquet -o measured --push me/measured
    """
    from .. import measure_adapter

    folder = measure_adapter(
        adapter,
        data,
        output,
        task_name=name,
        base_model=base_model,
        split=a.chosen_split(split, "train", [data]),
        images=images,
        system=system,
        max_samples=samples,
        batch_size=batch_size,
        seed=seed,
        device=device,
        model_options=a.model_options(load_in),
        statistics_options={"keep_prompts": keep_prompts},
        push_to=push,
        overwrite=overwrite,
        progress=not quiet,
    )
    typer.echo(f"The measured adapter: {folder}")
    if push is not None:
        typer.echo(f"On the Hub: {push}")
