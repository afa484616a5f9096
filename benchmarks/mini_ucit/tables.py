"""The benchmark's tables, made of nothing but the results: the same for the terminal, for Markdown and for HTML."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable

from peft_many.metrics import mean_and_spread

from .methods import Measurement, Method
from .run import Results

BOUND = "alone"  # the method whose accuracy others are compared with
BASE = "zero-shot"  # the method whose skills others may lose
SKILLS = {"plain": "base kept", "unseen": "unseen look kept", "perplexity": "perplexity of text"}
METRICS = {
    "faa": "FAA",
    "caa": "CAA",
    "ffm_from_learning": "FFM (learning)",
    "ffm_from_maximum": "FFM (maximum)",
    "mft": "MFT",
    "bwt": "BWT",
}


_IN_TERMINAL = ("seeds", "FAA", "mean", "of alone", SKILLS["plain"], METRICS["caa"], METRICS["ffm_from_learning"])


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

    Where tasks are of several kinds, a table of the kinds is followed by one for the tasks of each kind. Seeds differ
    much, so where some rows are of fewer seeds than others a column says how many.
    """
    tasks: list[str] = runs[0].about["tasks"]
    kinds: dict[str, list[str]] = {}
    for task, kind in runs[0].about.get("kinds", {}).items():
        kinds.setdefault(kind, []).append(task)
    each = {task: [task] for task in tasks}
    for group in dict.fromkeys(method.group for method in methods):
        of_group = [method for method in methods if method.group == group]
        done = [method for method in of_group if any(method.name in run.scores for run in runs)]
        if done:
            yield _table(runs, group, done, kinds or each)
            for kind, of_kind in kinds.items():
                yield _table(runs, kind, done, {task: [task] for task in of_kind})


def final_average(runs: Sequence[Results], method: str, tasks: Collection[str] = ()) -> list[float]:
    """FAA in per cent, for each seed; of some tasks, if they are named."""
    finals = [run.final(method) for run in runs]
    return [statistics.fmean(final[task] for task in tasks or final) for final in finals]


def _table(
    runs: Sequence[Results], title: str, methods: Sequence[Measurement], averaged: Mapping[str, Sequence[str]]
) -> Table:
    """`averaged` names the columns of scores, and the tasks that each is the mean of."""
    asked = [task for tasks in averaged.values() for task in tasks]
    having = {method.name: [run for run in runs if method.name in run.scores] for method in methods}
    uneven = any(len(of_method) < len(runs) for of_method in having.values())
    answers = any(isinstance(method, Method) for method in methods)
    bound = answers and all(BOUND in run.scores for run in runs)
    whole = len(asked) == len(runs[0].about["tasks"])
    with_matrix = whole and any(any(run.matrix(method.name) for run in having[method.name]) for method in methods)
    metrics = [name for name in METRICS if name != "faa"] if with_matrix else []
    skills = SKILLS if any(method.name in run.base for method in methods for run in runs) else {}
    columns = [
        title,
        *(["seeds"] if uneven else []),
        *averaged,
        "FAA" if answers and whole else "mean",
        *(["of alone"] if bound else []),
        *skills.values(),
        *(METRICS[name] for name in metrics),
    ]
    rows = []
    for method in methods:
        runs_of = having[method.name]
        cells = [method.name, *([str(len(runs_of))] if uneven else [])]
        cells += [f"{statistics.fmean(final_average(runs_of, method.name, tasks)):.1f}" for tasks in averaged.values()]
        averages = final_average(runs_of, method.name, asked)
        cells.append(_with_spread(averages))
        if bound:
            of_bound = statistics.fmean(final_average(runs_of, BOUND, asked))
            cells.append(f"{statistics.fmean(averages) / of_bound:.0%}" if of_bound else "")
        cells += [_kept(runs_of, method.name, skill) for skill in skills]
        matrices = [matrix for run in runs_of if (matrix := run.matrix(method.name)) is not None]
        summary = mean_and_spread(matrices) if matrices else {}
        cells += [f"{summary[name].mean:.1f}" if name in summary else "" for name in metrics]
        rows.append(cells)
    seeds = f"{len(runs)} seeds" if len(runs) > 1 else f"seed {runs[0].about['seed']}"
    return Table(f"{runs[0].about['model']}: {title} ({seeds})", columns, rows)


def _kept(runs: Sequence[Results], method: str, skill: str) -> str:
    """A skill relative to what the base model has: accuracy in per cent of it, perplexity as a multiple."""
    pairs = [(run.base[method][skill], run.base[BASE][skill]) for run in runs if {method, BASE} <= {*run.base}]
    if not pairs or any(of_base == 0 for _, of_base in pairs):
        return ""
    ratios = [value / of_base for value, of_base in pairs]
    return f"× {statistics.geometric_mean(ratios):.3g}" if skill == "perplexity" else f"{statistics.fmean(ratios):.0%}"


def _with_spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
