"""The benchmark's tables, made of nothing but the results: the same for the terminal, for Markdown and for HTML."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable

from peft_many.metrics import mean_and_spread

from .methods import Measurement, Method
from .run import Results

BOUND = "alone"  # the method whose accuracy others are compared with
METRICS = {
    "faa": "FAA",
    "caa": "CAA",
    "ffm_from_learning": "FFM (learning)",
    "ffm_from_maximum": "FFM (maximum)",
    "mft": "MFT",
    "bwt": "BWT",
}


_IN_TERMINAL = ("seeds", "FAA", "mean", "of alone", METRICS["caa"], METRICS["ffm_from_learning"])


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        title (`str`): Its heading.
        columns (`Sequence[str]`): The first is left-aligned, the others are numbers.
        rows (`Sequence[Sequence[str]]`): As many cells as columns.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> RichTable:
        """For the terminal, where eighty columns hold the averages but not every task."""
        table = RichTable(title=self.title, title_justify="left")
        shown = [i for i, column in enumerate(self.columns) if i == 0 or column in _IN_TERMINAL]
        for i in shown:
            table.add_column(self.columns[i], justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*(row[i] for i in shown))
        return table

    def markdown(self) -> str:
        """For the docs."""
        lines = [f"### {self.title}", "", _line(self.columns), _line(["---", *["---:"] * (len(self.columns) - 1)])]
        return "\n".join([*lines, *map(_line, self.rows), ""])


def tables_of(runs: Sequence[Results], methods: Sequence[Measurement]) -> Iterator[Table]:
    """For one model, all its seeds: a table for each group of methods, in the order of the methods.

    Seeds differ much, so where some rows are of fewer seeds than others a column says how many.
    """
    for group in dict.fromkeys(method.group for method in methods):
        of_group = [method for method in methods if method.group == group]
        done = [method for method in of_group if any(method.name in run.scores for run in runs)]
        if done:
            yield _table(runs, group, done)


def final_average(runs: Sequence[Results], method: str) -> list[float]:
    """FAA in per cent, for each seed."""
    return [statistics.fmean(run.scores[method][-1]) for run in runs]


def _table(runs: Sequence[Results], group: str, methods: Sequence[Measurement]) -> Table:
    tasks = runs[0].about["tasks"]
    having = {method.name: [run for run in runs if method.name in run.scores] for method in methods}
    uneven = any(len(of_method) < len(runs) for of_method in having.values())
    with_matrix = any(isinstance(method, Method) and method.every_stage for method in methods)
    answers = any(isinstance(method, Method) for method in methods)
    bound = answers and all(BOUND in run.scores for run in runs)
    metrics = [name for name in METRICS if name != "faa"] if with_matrix else []
    columns = [
        group,
        *(["seeds"] if uneven else []),
        *tasks,
        "FAA" if answers else "mean",
        *(["of alone"] if bound else []),
        *(METRICS[name] for name in metrics),
    ]
    rows = []
    for method in methods:
        runs_of = having[method.name]
        finals = [run.final(method.name) for run in runs_of]
        cells = [method.name, *([str(len(runs_of))] if uneven else [])]
        cells += [f"{statistics.fmean(final[task] for final in finals):.1f}" for task in tasks]
        averages = final_average(runs_of, method.name)
        cells.append(_with_spread(averages))
        if bound:
            cells.append(f"{statistics.fmean(averages) / statistics.fmean(final_average(runs_of, BOUND)):.0%}")
        matrices = [matrix for run in runs_of if (matrix := run.matrix(method.name)) is not None]
        summary = mean_and_spread(matrices) if matrices else {}
        cells += [f"{summary[name].mean:.1f}" if name in summary else "" for name in metrics]
        rows.append(cells)
    seeds = f"{len(runs)} seeds" if len(runs) > 1 else f"seed {runs[0].about['seed']}"
    return Table(f"{runs[0].about['model']}: {group} ({seeds})", columns, rows)


def _with_spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
