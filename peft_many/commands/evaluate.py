"""`peft-many evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..data.scores import METRICS
from . import arguments as a
from .running import print_json

if TYPE_CHECKING:
    from ..reports.evaluation import Evaluation

_Metric = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[TASK=]METRIC", help=f"How answers are scored: {', '.join(METRICS)}. [dim]default: exact[/dim]"
    ),
]
_Limit = Annotated[int | None, typer.Option(min=1, help="Ask only this many questions of each task, the first ones.")]
_Alone = Annotated[
    Literal["all", "own", "none"],
    typer.Option(help="Which questions each task's adapter is asked: all, those of its own task, none."),
]


def evaluate(
    merge: a.Merge,
    more: a.MoreData = None,
    data: Annotated[list[str] | None, a.data_option("Test questions of a task")] = None,
    metric: _Metric = None,
    alone: _Alone = "all",
    text: Annotated[Path | None, typer.Option(help="A text file to compute the perplexity of.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder for scores, answers and a picture.")
    ] = None,
    limit: _Limit = None,
    split: a.TestSplit = None,
    images: a.Images = None,
    base_model: a.Base = None,
    system: a.System = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 8,
    max_new_tokens: a.MaxNewTokens = 64,
    device: a.ModelDevice = None,
    load_in: a.LoadIn = None,
    overwrite: a.Replace = False,
    json: a.Json = False,
    quiet: a.Quiet = False,
) -> None:
    """Score a merge on test questions, beside the base model and each task's adapter alone.

    The adapters' files are not needed: the merge contains them.

    [bold]Examples[/bold]

    peft-many evaluate merged --data clevr=clevr.jsonl iconqa=iconqa.jsonl

    peft-many evaluate merged --data vqa=me/vqa --metric vqa --limit 500 -o scores

    peft-many evaluate merged --data clevr=clevr.jsonl --text prose.txt --json
    """
    from .. import evaluate_merge
    from ..reports.evaluation import check_evaluation_folder

    if output is not None:
        check_evaluation_folder(output, overwrite, merge)  # now, and not when all are asked
    by_task = a.data_by_task([*(data or ()), *(more or ())], "test questions")
    found = evaluate_merge(
        merge,
        by_task,
        metric=_metrics(metric),
        alone=alone,
        text=text,
        limit=limit,
        split=a.chosen_split(split, "test", by_task.values()),
        images=images,
        base_model=base_model,
        system=system,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        model_options=a.model_options(load_in),
        progress=not quiet,
    )
    _tell(found, output, overwrite, json)


def _tell(found: Evaluation, output: Path | None, overwrite: bool, json: bool) -> None:
    """Show scores, and write them thereafter: should that fail, they are not lost."""
    from .. import save_evaluation
    from .display import show_evaluation

    if json:
        print_json(found.to_dict())
    else:
        show_evaluation(found)
    if output is not None:
        folder = save_evaluation(found, output, overwrite=overwrite)
        if not json:
            typer.echo(f"Scores and answers: {folder}")


def _metrics(given: list[str] | None) -> str | dict[str, str]:
    """One metric for all tasks, or one for each that is named."""
    named = dict(text.split("=", 1) for text in given or () if "=" in text)
    whole = [text for text in given or () if "=" not in text]
    if len(whole) > 1 or (whole and named):
        raise typer.BadParameter(
            "Give one metric for all tasks, or TASK=METRIC for each that is not scored by exact.",
            param_hint="--metric",
        )
    return named or (whole[0] if whole else "exact")
