"""The benchmark's table as a picture: a bar for each method, and a dot for each of its tasks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.figure import Figure

_BAR = "#cfe3d8"


def bars(scores: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """The mean score of each method, with its deviation over seeds, and that of each task.

    Args:
        scores (`Mapping[str, Sequence[Mapping[str, float]]]`): By method and seed, the tasks' scores in per cent.
    """
    names = [*reversed(scores)]
    figure = Figure(figsize=(8.5, 1.2 + 0.34 * len(names)), layout="constrained")
    axis = figure.subplots()
    for row, name in enumerate(names):
        means = [statistics.fmean(seed.values()) for seed in scores[name]]
        error = statistics.stdev(means) if len(means) > 1 else None
        axis.barh(row, statistics.fmean(means), xerr=error, color=_BAR, error_kw={"capsize": 2})
    tasks = dict.fromkeys(task for found in scores.values() for seed in found for task in seed)
    for number, task in enumerate(tasks):
        dots = [
            (statistics.fmean(values), row)
            for row, name in enumerate(names)
            if (values := [seed[task] for seed in scores[name] if task in seed])
        ]
        axis.scatter(*zip(*dots), s=16, color=colormaps["tab20"](number % 20), label=task, zorder=3)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_xlim(0, 100)
    axis.set_xlabel("score in %: bars are means of the tasks, dots the tasks")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
