"""`peft-many pool`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..editing.pooling import DEFAULT_POOL_RANK, DEFAULT_STATISTICS_RANK, pool_adapters
from . import arguments as a


def pool(
    adapters: Annotated[list[str], typer.Argument(help=a.AnAdapter, show_default=False)],
    output: a.Output,
    name: Annotated[str | None, typer.Option(help="What to call the pool in merges.")] = None,
    weight: a.Weights = None,
    rank: Annotated[int, typer.Option(min=1, help="The largest rank of a pooled layer.")] = DEFAULT_POOL_RANK,
    statistics_rank: Annotated[
        int, typer.Option(min=1, help="The most directions of a pooled covariance.")
    ] = DEFAULT_STATISTICS_RANK,
    ridge: a.Ridge = None,
    device: a.Device = None,
    quiet: a.Quiet = False,
) -> None:
    """Make one adapter of several, whose size does not depend on how many, for merging without end.

    A pool cannot be taken apart: its tasks share one projector and none of them can be forgotten.

    [bold]Examples[/bold]

    peft-many pool pool-49 task-50 --output pool-50

    peft-many pool me/clevr me/iconqa --name counting --rank 64 --output counting
    """
    folder = pool_adapters(
        adapters,
        output,
        task_name=name,
        weights=a.weights_by_task(weight),
        rank=rank,
        statistics_rank=statistics_rank,
        ridge=ridge,
        device=device or "cpu",
        progress=not quiet,
    )
    typer.echo(f"The pool: {folder}")
