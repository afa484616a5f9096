"""The benchmark's table, made of nothing but the results of all seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .methods import METHODS, VARIANTS

_HEADINGS = {"perplexity": "perplexity of prose", "captions": "captions"}
_STAGE = "methods/"


def write_tables(output: Path, results_name: str) -> str:
    """`tables.md` beside the seeds' folders: a table for each set of tasks that was merged; its text."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob(f"seed*/{results_name}"))]
    sets = dict.fromkeys(stage.rpartition("/")[2] for run in runs for stage in run if stage.startswith(_STAGE))
    text = "\n".join(_table(runs, tasks.split("+")) for tasks in sets)
    (output / "tables.md").write_text(text, encoding="utf-8")
    return text


def _table(runs: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """In per cent: accuracy by task and on average, and as a share of each adapter's own; and the base's skills."""
    named = "+".join(tasks)
    by_method = {
        name: [run[stage]["result"] for run in runs if (stage := f"{_STAGE}{name}/{named}") in run]
        for name in (*METHODS, *VARIANTS)
    }
    skills = [
        name for name in _HEADINGS if any(name in found["skills"] for all_ in by_method.values() for found in all_)
    ]
    columns = ["method", "seeds", *tasks, "mean", "of alone", *(_HEADINGS[name] for name in skills)]
    lines = [f"### {', '.join(tasks)}", "", _line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
    bound = _mean_of(by_method["alone"])
    for name, found in by_method.items():
        if found:
            each = [_cell([one["accuracy"][task] for one in found]) for task in tasks]
            means = [_mean_of([one]) for one in found]
            share = f"{100 * _mean_of(found) / bound:.0f} %" if bound else ""
            known = [_cell([one["skills"][skill] for one in found if skill in one["skills"]]) for skill in skills]
            lines.append(_line([name, str(len(found)), *each, _cell(means), share, *known]))
    return "\n".join([*lines, ""])


def _mean_of(found: Sequence[Mapping[str, Any]]) -> float:
    scores = [score for one in found for score in one["accuracy"].values()]
    return sum(scores) / len(scores) if scores else 0.0


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
