"""The demo's picture: what the tasks look like, and who remembers what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import FigureBase

from benchmarks.mini_ucit.world import Example

_SHOWN = ("zero-shot", "sequential fine-tuning", "averaging", "MAny", "each task alone")
_COLOURS = ("#c9c9c9", "#e0a458", "#7fa7c9", "#2e8b57", "#555555")


def draw(path: Path, examples: Mapping[str, Sequence[Example]], scores: Mapping[str, Mapping[str, float]]) -> None:
    """Write a PNG: sample pictures of each task above, accuracy by method and task below.

    Args:
        path (`Path`): The file to write.
        examples (`Mapping[str, Sequence[Example]]`): Some examples of each task, as many of each.
        scores (`Mapping[str, Mapping[str, float]]`): Accuracy in per cent by method and task.
    """
    figure = plt.figure(figsize=(10, 6.4), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 2.4))[:, 0]
    _draw_tasks(above, examples)
    _draw_scores(below, scores)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_tasks(figure: FigureBase, examples: Mapping[str, Sequence[Example]]) -> None:
    blocks = figure.subfigures(1, len(examples), squeeze=False, wspace=0.04)[0]
    for block, (task, shown) in zip(blocks, examples.items()):
        block.suptitle(f"{task}\n“{shown[0].question}”", fontsize=10)
        for axes, example in zip(block.subplots(1, len(shown), squeeze=False)[0], shown):
            axes.imshow(example.image)
            axes.set_xlabel(example.answer.replace(" , ", ",\n").replace(" bar", "\nbar"), fontsize=8)
            axes.set(xticks=[], yticks=[])


def _draw_scores(figure: FigureBase, scores: Mapping[str, Mapping[str, float]]) -> None:
    axes = figure.subplots()
    tasks = list(scores["MAny"])
    groups = [*tasks, "mean"]
    width = 0.16
    for i, (method, colour) in enumerate(zip(_SHOWN, _COLOURS)):
        values = [scores[method][task] for task in tasks]
        values.append(sum(values) / len(values))
        places = np.arange(len(groups)) + (i - (len(_SHOWN) - 1) / 2) * width
        bars = axes.bar(places, values, width, label=method, color=colour)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.axvline(len(tasks) - 0.5, color="#dddddd", linewidth=1)
    axes.set(ylabel="exact-match accuracy, %", ylim=(0, 112))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(_SHOWN), loc="upper center", bbox_to_anchor=(0.5, 1.13), frameon=False, fontsize=9)
