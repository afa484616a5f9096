"""`python -m benchmarks.mini_ucit`: forgetting, measured for every method on six small tasks."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Annotated

import typer

_NEEDED = ("jinja2", "matplotlib", "rich", "sklearn")

app = typer.Typer(add_completion=False)


@app.command()
def bench(
    output: Annotated[Path, typer.Option(help="Where adapters, results and report go.")] = Path("many-bench"),
    quick: Annotated[bool, typer.Option("--quick", help="One model, one seed, less training, no ablations.")] = False,
    model: Annotated[list[str] | None, typer.Option(help="llava, llava-wide, qwen2-vl; all by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0.")] = 5,
    method: Annotated[
        list[str] | None, typer.Option(help="A method or a group of them, as the report names it; all by default.")
    ] = None,
    only_report: Annotated[
        bool, typer.Option("--only-report", help="Measure nothing; write the report of what is there.")
    ] = False,
) -> None:
    """Measure forgetting on Mini-UCIT: six small tasks, drawn from seeds, that contradict one another.

    Every method gets the same training budget. What was measured already is kept: a run that was interrupted goes on
    where it stopped. Results are JSON, one file for each model and seed; the report is made of them alone.

    python -m benchmarks.mini_ucit --quick  (under four minutes on two cores)

    python -m benchmarks.mini_ucit  (everything; overnight, and then some)

    python -m benchmarks.mini_ucit --model llava --method ridge  (one ablation)

    python -m benchmarks.mini_ucit --only-report  (tables and pictures again)
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        _stop(f"The benchmark needs {', '.join(missing)}: pip install -e '.[bench]'")
    from rich.console import Console
    from transformers.utils import logging

    from .methods import METHODS
    from .model import MODELS
    from .report import read_results, summary_of, write_report
    from .run import QUICK, Settings, all_methods, run

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    folder = output / "quick" if quick else output
    if not only_report:
        names = model or (["llava"] if quick else list(MODELS))
        unknown = [name for name in names if name not in MODELS]
        if unknown:
            _stop(f"There is no model '{unknown[0]}'; there are {', '.join(MODELS)}.")
        every = list(all_methods())
        known = {named for one in every for named in (one.name, one.group)}
        strange = [name for name in method or () if name not in known]
        if strange:
            _stop(f"There is no method '{strange[0]}'; there are {', '.join(sorted(known))}.")
        chosen = [one for one in every if not method or one.name in method or one.group in method]
        if quick and not method:
            chosen = [one for one in METHODS.values() if one.quick]
        try:
            run(folder, names, range(1 if quick else seeds), QUICK if quick else Settings(), chosen)
        except ValueError as error:
            _stop(str(error))
    try:
        results = read_results(folder)
    except FileNotFoundError as error:
        _stop(str(error))
    console = Console()
    for runs in results.values():
        for table in summary_of(runs):
            console.print(table.rich())
    typer.echo(f"The report: {write_report(results, folder)}")  # in one line, however long the path is


def _stop(message: str) -> None:
    typer.secho(message, err=True, fg="red")
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
