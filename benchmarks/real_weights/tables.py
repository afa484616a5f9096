"""The benchmark's tables and pictures, made of nothing but the results of all seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_many.files.atomic import replace_file

from .methods import METHODS, VARIANTS
from .plot import bars

_Found = Mapping[str, Sequence[Mapping[str, Any]]]  # by method, what each seed gave
_HEADINGS = {"perplexity": "perplexity of prose", "captions": "captions"}
_STAGE = "methods/"


def write_report(output: Path, results_name: str) -> str:
    """`tables.md` beside the seeds' folders, and for each set of tasks that was merged a picture; the tables' text.

    Raises:
        FileNotFoundError: There are no results.
    """
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob(f"seed*/{results_name}"))]
    sets = dict.fromkeys(stage.rpartition("/")[2] for run in runs for stage in run if stage.startswith(_STAGE))
    if not sets:
        raise FileNotFoundError(f"'{output}' has no results of merging.")
    tables = []
    for number, named in enumerate(sets, start=1):
        found = _found(runs, named)
        tables.append(_table(found, named.split("+")))
        scores = {name: [one["scores"] for one in of_seeds] for name, of_seeds in found.items() if name in METHODS}
        if scores:
            with replace_file(output / f"methods-{number}.png") as temporary:
                bars(scores).savefig(temporary, dpi=130, format="png")
    text = "\n".join(tables)
    with replace_file(output / "tables.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def _found(runs: Sequence[Mapping[str, Any]], named: str) -> _Found:
    by_method = {
        name: [run[stage]["result"] for run in runs if (stage := f"{_STAGE}{name}/{named}") in run]
        for name in (*METHODS, *VARIANTS)
    }
    return {name: found for name, found in by_method.items() if found}


def _table(by_method: _Found, tasks: Sequence[str]) -> str:
    """In per cent: the score by task and on average, and as a share of each adapter's own; and the base's skills."""
    skills = [
        name for name in _HEADINGS if any(name in found["skills"] for all_ in by_method.values() for found in all_)
    ]
    columns = ["method", "seeds", *tasks, "mean", "of alone", *(_HEADINGS[name] for name in skills)]
    lines = [f"### {', '.join(tasks)}", "", _line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
    bound = _mean_of(by_method.get("alone", []))
    for name, found in by_method.items():
        each = [_cell([one["scores"][task] for one in found]) for task in tasks]
        means = [_mean_of([one]) for one in found]
        share = f"{100 * _mean_of(found) / bound:.0f} %" if bound else ""
        known = [_cell([one["skills"][skill] for one in found if skill in one["skills"]]) for skill in skills]
        lines.append(_line([name, str(len(found)), *each, _cell(means), share, *known]))
    return "\n".join([*lines, ""])


def _mean_of(found: Sequence[Mapping[str, Any]]) -> float:
    scores = [score for one in found for score in one["scores"].values()]
    return sum(scores) / len(scores) if scores else 0.0


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
