"""The arguments and options that several commands have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..merging.plan import MEAN, ROUTED
from ..merging.recipe import DTYPES, read_recipe
from ..methods import LPM, METHODS
from ..tuner.config import ROUTERS


def choices(*known: str) -> Callable[[str], list[str]]:
    """For tab completion."""
    return lambda incomplete: [one for one in known if one.startswith(incomplete)]


AnAdapter = "A folder or a Hub id: me/adapter, me/adapter@revision."
Adapters = Annotated[
    list[str] | None,
    typer.Argument(
        help="Folders and Hub ids (me/adapter, me/adapter@revision), merges among them.", show_default=False
    ),
]
Recipe = Annotated[
    Path | None, typer.Option("--recipe", "-r", help="A YAML file with adapters and options.", show_default=False)
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)]
Weights = Annotated[
    list[str] | None,
    typer.Option("--weight", "-w", metavar="TASK=W", help="Weight of a task; repeat it. 1 by default."),
]
Without = Annotated[list[str] | None, typer.Option("--without", metavar="TASK", help="Leave out a task; repeat it.")]
Method = Annotated[
    str | None,
    typer.Option(
        help=f"{LPM}, {', '.join(METHODS)}. [dim]default: {LPM}[/dim]", autocompletion=choices(LPM, *METHODS)
    ),
]
Projectors = Annotated[
    str | None,
    typer.Option(
        help=f"{ROUTED}, or {MEAN}: average their weights. [dim]default: {ROUTED}[/dim]",
        autocompletion=choices(ROUTED, MEAN),
    ),
]
Ridge = Annotated[float | None, typer.Option(min=0, help="LPM's λ. [dim]default: 1e-4[/dim]")]
Router = Annotated[
    str | None,
    typer.Option(
        help="How images are compared with tasks: cosine, gaussian. [dim]default: cosine[/dim]",
        autocompletion=choices(*ROUTERS),
    ),
]
Temperature = Annotated[float | None, typer.Option(help="τ of the routing. [dim]default: 0.02, gaussian: 1[/dim]")]
TopK = Annotated[int | None, typer.Option(min=1, help="The most projectors an image is sent through.")]
AbstainAbove = Annotated[
    float | None, typer.Option(help="gaussian: from which distance on images go to the base model's projector.")
]
Rank = Annotated[int | None, typer.Option(min=1, help="The largest rank of a merged layer. [dim]default: Σ r[/dim]")]
GateLora = Annotated[
    bool | None, typer.Option("--gate-lora/--no-gate-lora", help="Let images choose the LoRA too.", show_default=False)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help=f"Of the merged weights: {', '.join(DTYPES)}. [dim]default: float32[/dim]",
        autocompletion=choices(*DTYPES),
    ),
]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, … [dim]default: cpu[/dim]")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the adapter that is in the output folder.")]
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def merge_arguments(
    adapters: list[str] | None,
    recipe: Path | None,
    weight: list[str] | None,
    without: list[str] | None,
    dtype: str | None,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of the merging functions: those of the recipe, and over them what the command line says."""
    if bool(adapters) == bool(recipe):
        raise typer.BadParameter("Give the adapters here or by --recipe, one of the two.")
    arguments: dict[str, Any] = read_recipe(recipe) if recipe is not None else {"adapters": adapters}
    if weight:
        arguments["weights"] = {**_weights_of(arguments), **(weights_by_task(weight) or {})}
    if without:
        arguments["without"] = without
    if dtype is not None:
        if dtype not in DTYPES:
            raise typer.BadParameter(f"'{dtype}' is none of {', '.join(DTYPES)}.", param_hint="--dtype")
        arguments["dtype"] = DTYPES[dtype]
    return arguments | {name: value for name, value in options.items() if value is not None}


def _weights_of(recipe: Mapping[str, Any]) -> Mapping[str, float]:
    weights = recipe.get("weights") or {}
    if not isinstance(weights, Mapping):
        raise typer.BadParameter(
            "The recipe gives weights by adapter, and --weight one by task; give the recipe's by task too, under "
            "`options: weights`.",
            param_hint="--weight",
        )
    return weights


def weights_by_task(given: list[str] | None) -> dict[str, float] | None:
    """What `--weight task=number` says, several times."""
    weights = {}
    for text in given or ():
        task, _, number = text.rpartition("=")
        try:
            weights[task] = float(number)
        except ValueError:
            task = ""
        if not task:
            raise typer.BadParameter(f"'{text}' is not TASK=NUMBER.", param_hint="--weight")
    return weights or None
