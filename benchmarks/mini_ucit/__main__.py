"""`python -m benchmarks.mini_ucit`: forgetting, measured for every method on six small tasks, and on 24 hard ones."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
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
    suite: Annotated[
        list[str] | None, typer.Option(help="six, hard (the six and eighteen more in one merge); both by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0.")] = 5,
    method: Annotated[
        list[str] | None, typer.Option(help="A method or a group of them, as the report names it; all by default.")
    ] = None,
    only_report: Annotated[
        bool, typer.Option("--only-report", help="Measure nothing; write the report of what is there.")
    ] = False,
) -> None:
    """Measure forgetting on Mini-UCIT: six small tasks, drawn from seeds, that contradict one another; then with
    eighteen more, which their pictures or instructions do not tell from others.

    Every method gets the same training budget. What was measured already is kept: a run that was interrupted goes on
    where it stopped. Results are JSON, one file for each model and seed; the report is made of them alone.

    python -m benchmarks.mini_ucit --quick  (under four minutes on two cores)

    python -m benchmarks.mini_ucit  (everything; overnight, and then some)

    python -m benchmarks.mini_ucit --model llava --method ridge  (one ablation)

    python -m benchmarks.mini_ucit --suite hard --seeds 1 --model llava  (an hour)

    python -m benchmarks.mini_ucit --only-report  (tables and pictures again)
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        _stop(f"The benchmark needs {', '.join(missing)}: pip install -e '.[bench]'")
    from transformers.utils import logging

    from .methods import METHODS
    from .model import MODELS
    from .run import SUITES, all_methods, run

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    folder = output / "quick" if quick else output
    names = model or (["llava"] if quick else list(MODELS))
    suites = suite or (["six"] if quick else list(SUITES))
    _check("model", names, MODELS)
    _check("suite", suites, SUITES)
    if not only_report:
        every = {name: list(all_methods(name)) for name in suites}
        known = {named for of_suite in every.values() for one in of_suite for named in (one.name, one.group)}
        _check("method", method or (), known)
        for name in suites:
            chosen = [one for one in every[name] if not method or one.name in method or one.group in method]
            if quick and not method and name == "six":
                chosen = [one for one in METHODS.values() if one.quick]
            settings = replace(SUITES[name], steps=240, tests=100) if quick else SUITES[name]
            try:
                run(folder, names, range(1 if quick else seeds), settings, chosen)
            except ValueError as error:
                _stop(str(error))
    _show(folder, suites)


def _show(folder: Path, suites: Sequence[str]) -> None:
    """Print the tables of what there is, and write the report."""
    from rich.console import Console

    from .report import read_results, summary_of, write_report

    found = {suite: results for suite in suites if (results := read_results(folder, suite))}
    if not found:
        _stop(f"There are no results of the benchmark in '{folder}'.")
    for suite, results in found.items():
        for runs in results.values():
            for table in summary_of(runs, suite):
                Console().print(table.rich())
        typer.echo(f"The report: {write_report(results, folder, suite)}")  # in one line, however long the path is


def _check(what: str, given: Iterable[str], there: Iterable[str]) -> None:
    """Stop at a name that there is not."""
    for name in given:
        if name not in there:
            _stop(f"There is no {what} '{name}'; there are {', '.join(sorted(there))}.")


def _stop(message: str) -> None:
    typer.secho(message, err=True, fg="red")
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
