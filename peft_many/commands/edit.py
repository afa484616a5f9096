"""`peft-many add`, `peft-many remove` and `peft-many pool`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..editing.pool_sizes import DEFAULT_POOL_RANK, DEFAULT_STATISTICS_RANK
from . import arguments as a
from .merge import say_merged, show_without_writing


def _tasks_of(ctx: typer.Context, incomplete: str) -> list[str]:
    """For tab completion: the tasks of the merge that was named before."""
    try:
        config = json.loads(Path(ctx.params["merge"], "adapter_config.json").read_text(encoding="utf-8"))
        return [task["name"] for task in config["merge"]["tasks"] if task["name"].startswith(incomplete)]
    except (KeyError, OSError, TypeError, ValueError):
        return []


NewPlace = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The folder to write. By default the merge's own folder is replaced."),
]


def add(
    merge: a.Merge,
    adapter: a.Adapter,
    output: NewPlace = None,
    name: Annotated[str | None, typer.Option(help="The name of the task in the merge.")] = None,
    weight: a.Weights = None,
    same_base: a.SameBase = False,
    device: a.Device = None,
    dry_run: a.DryRun = False,
    quiet: a.Quiet = False,
) -> None:
    """Add a task to a merge; the adapters that it was made of are not needed.

    The result is the same as merging all of them at once, with the merge's options.

    [bold]Examples[/bold]

    peft-many add merged me/new-task [dim]# replaces the folder[/dim]

    peft-many add merged me/new@v2 --name charts --weight charts=0.5 -o merged-2
    """
    from .. import add_task

    weights = a.weights_by_task(weight)
    if dry_run:
        names = None if name is None else [None, name]
        _show_change([merge, adapter], output, weights, device, quiet, task_names=names, same_base=same_base)
        return
    folder = add_task(
        merge,
        adapter,
        output,
        task_name=name,
        same_base=same_base,
        weights=weights,
        device=device or "cpu",
        progress=not quiet,
    )
    say_merged(folder)


def remove(
    merge: a.Merge,
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK", help="The task's name in the merge.", autocompletion=_tasks_of, show_default=False
        ),
    ],
    output: NewPlace = None,
    weight: a.Weights = None,
    device: a.Device = None,
    dry_run: a.DryRun = False,
    quiet: a.Quiet = False,
) -> None:
    """Remove a task from a merge, exactly: the result is as if it had never been merged.

    No tensor of the task is left in the files.

    [bold]Examples[/bold]

    peft-many remove merged clevr [dim]# replaces the folder[/dim]

    peft-many remove merged clevr --output merged-without-clevr

    peft-many inspect merged [dim]# it is gone[/dim]
    """
    from .. import remove_task

    weights = a.weights_by_task(weight)
    if dry_run:
        typer.echo(f"Without '{task}':")
        _show_change([merge], output, weights, device, quiet, without=[task])
        return
    folder = remove_task(merge, task, output, weights=weights, device=device or "cpu", progress=not quiet)
    say_merged(folder)


def _show_change(
    adapters: list[str],
    output: Path | None,
    weights: dict[str, float] | None,
    device: str | None,
    quiet: bool,
    **change: Any,
) -> None:
    """Show what a merge, the first of the adapters, would be after a change; its options stay."""
    from ..editing.tasks import merge_options, place_for

    place = Path(place_for(adapters[0], output))
    arguments = {"adapters": adapters, "weights": weights, "device": device or "cpu", **change}
    show_without_writing(arguments | vars(merge_options(adapters[0])), place, output is None, quiet)


def pool(
    adapters: a.Adapters,
    output: a.Output,
    name: Annotated[str | None, typer.Option(help="The name of the pool in merges.")] = None,
    weight: a.Weights = None,
    rank: Annotated[int, typer.Option(min=1, help="The largest rank of a pooled layer.")] = DEFAULT_POOL_RANK,
    statistics_rank: Annotated[
        int, typer.Option(min=1, help="The largest rank of a pooled covariance.")
    ] = DEFAULT_STATISTICS_RANK,
    same_base: a.SameBase = False,
    ridge: a.Ridge = None,
    device: a.Device = None,
    quiet: a.Quiet = False,
) -> None:
    """Combine several adapters into one, a pool, whose size does not grow with their number.

    A pool cannot be taken apart: its tasks share one projector, and none of them can be removed again.

    [bold]Examples[/bold]

    peft-many pool pool-49 task-50 --output pool-50

    peft-many pool me/clevr me/iconqa --name counting --rank 64 --output counting
    """
    from .. import pool_adapters

    folder = pool_adapters(
        adapters,
        output,
        task_name=name,
        weights=a.weights_by_task(weight),
        rank=rank,
        statistics_rank=statistics_rank,
        same_base=same_base,
        ridge=ridge,
        device=device or "cpu",
        progress=not quiet,
    )
    typer.echo(f"The pool: {folder}")
