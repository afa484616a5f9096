"""`peft-many refit`."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from . import arguments as a


def refit(
    merge: a.Merge,
    output: a.Output,
    more: a.MoreData = None,
    data: Annotated[list[str] | None, a.data_option("Samples of a task")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The largest rank of a refitted layer.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="The number of samples of each task.")] = 128,
    weigh_tokens: Annotated[
        bool, typer.Option(help="Count tokens by how far they move the answers, by backward passes.")
    ] = True,
    split: a.TrainSplit = None,
    images: a.Images = None,
    base_model: a.Base = None,
    system: a.System = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations per batch.")] = 4,
    seed: Annotated[int, typer.Option(help="The random seed that chooses the rows.")] = 0,
    device: a.ModelDevice = None,
    load_in: a.LoadIn = None,
    overwrite: a.Overwrite = False,
    quiet: a.Quiet = False,
) -> None:
    """Fit a merge's LoRA to what each layer gets in the merge, on samples of its tasks or without any.

    Better than the merge itself for servers that know no gates. Without data, samples are imagined from prompts that
    the tasks' adapters kept: measure --keep-prompts.

    [bold]Examples[/bold]

    peft-many refit merged --output refitted [dim]# on prompts that adapters kept[/dim]

    peft-many refit merged -d clevr=clevr.jsonl iconqa=iconqa.jsonl -o refitted
    """
    from .. import refit_merge_files
    from .tables import say

    by_task = a.data_by_task([*(data or ()), *(more or ())])
    folder = refit_merge_files(
        merge,
        output,
        by_task or None,
        rank=rank,
        max_samples=samples,
        weigh_tokens=weigh_tokens,
        base_model=base_model,
        split=a.chosen_split(split, "train", by_task.values()),
        images=images,
        system=system,
        batch_size=batch_size,
        seed=seed,
        device=device,
        model_options=a.model_options(load_in),
        overwrite=overwrite,
        progress=not quiet,
    )
    say(f"To compare it with the merge: peft-many evaluate {shlex.quote(str(folder))} --data TASK=DATA", aside=True)
    typer.echo(f"The refitted merge: {folder}")
