"""The benchmark's pictures: accuracy matrices, what is left after each task, and what each option is worth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from .methods import Method
from .prediction import MERGES
from .run import Results
from .tables import BOUND, final_average

_COLOUR = "#2e8b57"


def matrices(runs: Sequence[Results], methods: Sequence[Method]) -> Figure | None:
    """The mean accuracy matrix of each method that was asked after every task: rows are stages, columns tasks."""
    found = {}
    for method in methods:
        of_runs = [run.matrix(method.name) for run in runs if method.name in run.scores]
        scores = [matrix.scores for matrix in of_runs if matrix is not None]
        if scores:
            found[method.name] = np.mean(scores, axis=0)
    if not found:
        return None
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.0 * lines), layout="constrained")
    axes = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    tasks = runs[0].about["tasks"]
    for axis, (name, scores) in zip(axes, found.items()):
        axis.imshow(scores, vmin=0, vmax=100, cmap="YlGn")
        for t, i in zip(*np.where(~np.isnan(scores))):
            axis.text(i, t, f"{scores[t, i]:.0f}", ha="center", va="center", fontsize=7)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(len(tasks)), tasks, rotation=60, fontsize=7)
        axis.set_yticks(range(len(tasks)), [f"after {task}" for task in tasks], fontsize=7)
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    return figure


def forgetting(runs: Sequence[Results], methods: Sequence[Method]) -> Figure | None:
    """The average accuracy on the tasks so far, after each of them; the bound is each task alone."""
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axis = figure.subplots()
    tasks = runs[0].about["tasks"]
    drawn = 0
    for method in methods:
        of_runs = [run.matrix(method.name) for run in runs if method.name in run.scores]
        curves = [matrix.stage_averages for matrix in of_runs if matrix is not None]
        if curves:
            colour = colormaps["tab20"](drawn % 20)
            axis.plot(tasks, np.mean(curves, axis=0), marker="o", label=method.name, color=colour)
            drawn += 1
    if all(BOUND in run.scores for run in runs):
        alone = np.mean([run.scores[BOUND][-1] for run in runs], axis=0)
        averages = np.cumsum(alone) / np.arange(1, len(alone) + 1)
        axis.plot(tasks, averages, color="#222222", linewidth=1, linestyle=":", label="each task alone")
    axis.set(ylabel="average accuracy so far, %", xlabel="after learning", ylim=(0, 102))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure if drawn else None


def ablations(runs: Sequence[Results], methods: Sequence[Method]) -> Figure | None:
    """FAA by the value of each number, with its spread over seeds; the dotted line is MAny as it comes."""
    groups: dict[str, list[Method]] = {}
    for method in methods:
        if all(method.name in run.scores for run in runs):
            groups.setdefault(method.group, []).append(method)
    if not groups:
        return None
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.6 * lines), layout="constrained")
    axes = np.atleast_1d(figure.subplots(lines, columns, sharey=True)).ravel()
    for axis, (group, of_group) in zip(axes, groups.items()):
        values = [final_average(runs, method.name) for method in of_group]
        spreads = [statistics.stdev(value) if len(value) > 1 else 0.0 for value in values]
        names = [method.name for method in of_group]
        axis.errorbar(names, [statistics.fmean(value) for value in values], spreads, marker="o", color=_COLOUR)
        if all("MAny" in run.scores for run in runs):
            axis.axhline(statistics.fmean(final_average(runs, "MAny")), color="#999999", linestyle=":", linewidth=1)
        axis.set_title(group, fontsize=9)
        axis.tick_params(axis="x", rotation=60, labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("FAA, %")
    return figure


def residuals(runs: Sequence[Results]) -> Figure | None:
    """Points lost by each task in each merge over its residual, with rank correlations."""
    merges = [
        name for name in MERGES if all({f"residual of {name}", f"accuracy of {name}"} <= {*run.scores} for run in runs)
    ]
    if not merges or not all(BOUND in run.scores for run in runs):
        return None
    tasks = runs[0].about["tasks"]
    # By merge, seed and task.
    found = np.array([[run.scores[f"residual of {name}"][-1] for run in runs] for name in merges])
    bounds = np.array([run.scores[BOUND][-1] for run in runs])
    lost = bounds - np.array([[run.scores[f"accuracy of {name}"][-1] for run in runs] for name in merges])
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_task, by_merge = figure.subplots(1, 2, sharey=True)
    for t, task in enumerate(tasks):
        by_task.plot(found[:, :, t].ravel(), lost[:, :, t].ravel(), "o", markersize=4, label=task)
    places = [(s, t) for s in range(len(runs)) for t in range(len(tasks))]
    within = np.mean([spearmanr(found[:, s, t], lost[:, s, t])[0] for s, t in places])
    by_task.set_title(f"each task, merged in {len(merges)} ways: rank correlation {within:.2f}", fontsize=9)
    by_task.legend(frameon=False, fontsize=8)
    across = np.mean([spearmanr(found[0, s], lost[0, s])[0] for s in range(len(runs))])
    by_merge.plot(found[0].ravel(), lost[0].ravel(), "o", markersize=4, color=_COLOUR)
    by_merge.set_title(f"the tasks of one merge ({merges[0]}): rank correlation {across:.2f}", fontsize=9)
    for axis in (by_task, by_merge):
        axis.set_xlabel("residual, % of the outputs")
        axis.spines[["top", "right"]].set_visible(False)
    by_task.set_ylabel("points lost against the task alone")
    return figure
