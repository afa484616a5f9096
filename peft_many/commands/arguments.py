"""The arguments and options that several commands have."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .merge_options import OPTIONS

Adapter = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER", help="A folder or a Hub id: me/adapter, me/adapter@revision.", show_default=False
    ),
]
_SEVERAL = typer.Argument(
    metavar="ADAPTER",
    help="Folders or Hub ids (me/adapter, me/adapter@revision) of adapters and merges.",
    show_default=False,
)
Adapters = Annotated[list[str], _SEVERAL]
AdaptersUnlessRecipe = Annotated[list[str] | None, _SEVERAL]
Merge = Annotated[str, typer.Argument(metavar="MERGE", help="The folder or Hub id of a merge.", show_default=False)]
Recipe = Annotated[
    Path | None,
    typer.Option("--recipe", "-r", help="A YAML file that lists the adapters and options.", show_default=False),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weight", "-w", metavar="TASK=W", help="How much a task counts, 1 by default. Can be given several times."
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Option("--name", metavar="ADAPTER=TASK", help="The name of an adapter's task. Can be given several times."),
]
Without = Annotated[
    list[str] | None,
    typer.Option("--without", metavar="TASK", help="Leave out this task. Can be given several times."),
]
SameBase = Annotated[
    bool,
    typer.Option(
        "--same-base", help="Accept adapters that name different base models: these are one model under several names."
    ),
]
Ridge = Annotated[float | None, typer.Option(min=0, help=OPTIONS["ridge"]["help"])]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, … [dim]default: cpu[/dim]")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the adapter that is in the output folder.")]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace earlier results that are in the output folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
# Of commands that run a base model.
SomeData = "a .json, .jsonl, .parquet or .csv file, or a folder or Hub id that `datasets` reads."
MoreData = Annotated[
    list[str] | None,
    typer.Argument(metavar="TASK=DATA", help="Further tasks and their data, as in --data.", show_default=False),
]
_SPLIT = "The split to read of a data set; files have none. [dim]default: {}[/dim]"
TrainSplit = Annotated[str | None, typer.Option("--split", help=_SPLIT.format("train"))]
TestSplit = Annotated[str | None, typer.Option("--split", help=_SPLIT.format("test"))]
Base = Annotated[
    str | None,
    typer.Option(
        "--base-model", help="Folder or Hub id of a base model to use in place of the one that the adapter names."
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(help="The folder that image paths in the data are relative to. [dim]default: the data file's[/dim]"),
]
System = Annotated[
    str | None,
    typer.Option(help="The system prompt that the adapter was trained with, if the chat template does not add it."),
]
ModelDevice = Annotated[
    str | None, typer.Option(help="Where to run: cpu, cuda, … [dim]default: the accelerator, if there is one[/dim]")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")]
LoadIn = Annotated[
    Literal["4bit", "8bit", "float32", "bfloat16", "float16"] | None,
    typer.Option(
        metavar="PRECISION",
        help="The precision of the base model: 4bit or 8bit, by bitsandbytes, or float32, bfloat16, float16. "
        "[dim]default: the dtype it is stored in[/dim]",
    ),
]


def _without_bars(quiet: bool) -> bool:
    """Keep the bars of libraries away too, none of which is imported yet."""
    if quiet:
        os.environ |= dict.fromkeys(("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"), "1")
    return quiet


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bars.", callback=_without_bars)]


def merge_arguments(
    adapters: list[str] | None,
    recipe: Path | None,
    weight: list[str] | None,
    name: list[str] | None,
    without: list[str] | None,
    same_base: bool,
    device: str | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of the merging functions: those of the recipe, and over them what the command line says."""
    if bool(adapters) == bool(recipe):
        raise typer.BadParameter("Give either adapters or a --recipe.")
    from .. import MergeOptions, read_recipe

    arguments: dict[str, Any] = read_recipe(recipe) if recipe is not None else {"adapters": adapters}
    if weights := weights_by_task(weight):
        of_recipe = arguments.get("weights") or {}
        if not isinstance(of_recipe, Mapping):
            raise typer.BadParameter(
                "The recipe gives weights by adapter, but --weight gives one by task. Give those of the recipe by "
                "task too, under `options: weights`.",
                param_hint="--weight",
            )
        arguments["weights"] = {**of_recipe, **weights}
    if name:
        arguments["task_names"] = _task_names(arguments, name)
    if without:
        arguments["without"] = without
    if same_base:
        arguments["same_base"] = True
    if device is not None:
        arguments["device"] = device
    given = {name: value for name, value in options.items() if value is not None}
    try:
        chosen = MergeOptions.read(given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return arguments | {name: getattr(chosen, name) for name in given}


def _task_names(arguments: Mapping[str, Any], given: list[str]) -> list[Any]:
    """A name, or none, for each of the adapters; what `--name adapter=task` says goes over what a recipe says."""
    adapters = arguments["adapters"]
    names = list(arguments.get("task_names") or [None] * len(adapters))
    for text in given:
        adapter, _, task = text.rpartition("=")
        if adapter not in adapters or not task:
            raise typer.BadParameter(
                f"'{text}' is not ADAPTER=TASK; the adapters are {', '.join(map(repr, adapters))}.",
                param_hint="--name",
            )
        names[adapters.index(adapter)] = task
    return names


def weights_by_task(given: list[str] | None) -> dict[str, float] | None:
    """What `--weight task=number` says, several times."""
    weights: dict[str, float] = {}
    for text in given or ():
        task, _, number = text.rpartition("=")
        if task in weights:
            raise typer.BadParameter(f"'{task}' is weighed twice.", param_hint="--weight")
        try:
            weights[task] = float(number)
        except ValueError:
            task = ""
        if not task:
            raise typer.BadParameter(f"'{text}' is not TASK=NUMBER.", param_hint="--weight")
    return weights or None


def data_option(what: str) -> Any:
    """`--data`, which takes data of several tasks."""
    return typer.Option(
        "--data",
        "-d",
        metavar="TASK=DATA",
        help=f"{what}: {SomeData} Without TASK=, the task is called as the file is. Can be given several times.",
    )


def data_by_task(given: list[str], needed: str = "") -> dict[str, str]:
    """What `--data task=data` says, several times; without a name a file's own is the task's."""
    found: dict[str, str] = {}
    for text in given:
        task, named, place = text.partition("=")
        task, place = (task, place) if named else (Path(text).stem, text)
        if task in found:
            raise typer.BadParameter(
                f"Data of '{task}' are given twice: {found[task]} and {place}. Name each: TASK=DATA.",
                param_hint="--data",
            )
        found[task] = place
    if needed and not found:
        raise typer.BadParameter(f"Give {needed}: --data TASK=DATA, for each task.", param_hint="--data")
    return found


def chosen_split(split: str | None, default: str, data: Iterable[str]) -> str:
    """What `--split` says, if any of the data has splits, or the default."""
    if split is not None and all(Path(place).expanduser().is_file() for place in data):
        raise typer.BadParameter(
            "There is no data set to read a split of; files are read whole.", param_hint="--split"
        )
    return split or default


def model_options(load_in: str | None) -> dict[str, Any]:
    """Arguments of the base model's `from_pretrained` for `--load-in`; projectors, which tasks train, stay whole."""
    if load_in is None:
        return {}
    if not load_in.endswith("bit"):
        return {"dtype": load_in}
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(**{f"load_in_{load_in}": True})}
