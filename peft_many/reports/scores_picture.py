"""A picture of an evaluation: who answers which task how well."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from ..records.words import shortened


def draw_scores(scores: Mapping[str, Mapping[str, float]], metrics: Mapping[str, str]) -> Figure:
    """A matrix with a row for each who answered and a column for each task, coloured from 0 to 100 per cent."""
    names, tasks = list(scores), list(metrics)
    height, width = 0.5 * len(names) + 2.0, 0.9 * len(tasks) + 3.5
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    rows = [[scores[name].get(task, float("nan")) for task in tasks] for name in names]
    image = axes.imshow(rows, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if value == value:  # not NaN
                axes.text(x, y, f"{value:.1f}", ha="center", va="center", color="white" if value > 60 else "black")
    axes.set_xticks(range(len(tasks)), [shortened(task, 30) for task in tasks], rotation=30, ha="right")
    axes.set_yticks(range(len(names)), [shortened(name, 30) for name in names])
    axes.set_xlabel("questions of")
    axes.set_title("Right answers, %" if set(metrics.values()) == {"exact"} else "Score, %")
    figure.colorbar(image)
    return figure
