"""The pictures and the page of a report on a merge."""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Sequence

from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.filesize import decimal

from ..records import GATES, most_telling
from ..records.words import counted, shortened
from .costs import MergeReport, amount

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
.wide { overflow-x: auto; }
footer, dd { color: #666; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>A merge of {{ tasks }}</title>
<style>{{ style }}</style>
</head>
<body>
<h1>A merge of {{ tasks }}</h1>
<p>What merging costs each task, before any evaluation: no model was run for this page.</p>
<table>
<tr><th>task</th><th>interference</th><th>largest residual, in layer</th><th>loses most by</th>
<th>directions of its outputs</th><th>of its inputs</th><th>statistics</th></tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p><b>Interference</b> is the mean over {{ report.layers | length }} layers of the <b>residual</b>: how far the merged
LoRA's outputs on the task's inputs are from those of the task's own LoRA, relative to their size. 0 is as if alone, 1
as if the task's LoRA were lost. Use it to compare merges of the same tasks. It does not tell how many answers become
wrong: on the toy of this project some answers stayed right at a half, others became wrong at a third.
<b>Directions</b> are effective ranks, mean over layers. The merged LoRA takes {{ weights }}.</p>
{% if report.conflicts is not none %}<p><b>Conflicts</b>, in the picture, are the residuals that the task of the row
would have in a merge with the task of the column alone.</p>
<ul>{% for line in report.conflicts_in_words() %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% if report.routing %}<p><b>Where inputs go</b>: the mean weight that images of the row's task would have for the
column's, and with a gated LoRA the share of all its inputs that would get the column's own, were they Gaussian with
the mean and covariance that were measured. The error of these from few samples is taken into account.</p>
<ul>
{% for name, expected in told.items() %}{% for line in expected.in_words(name) %}<li>{{ line }}</li>
{% endfor %}{% endfor %}</ul>{% endif %}
<img alt="Residuals by layer and task; conflicts; where inputs go" src="data:image/png;base64,{{ picture }}">
</body>
</html>
"""


def page(report: MergeReport, figure: Figure) -> str:
    """One HTML page with the figure in it, which needs no other file."""
    template = Environment(autoescape=True).from_string(_PAGE)
    return template.render(
        report=report,
        tasks=counted(len(report.tasks), "task"),
        told=most_telling(report.routing),
        style=STYLE,
        rows=[_row(report, t) for t in range(len(report.tasks))],
        weights=decimal(report.weight_bytes),
        picture=embedded(figure),
    )


def embedded(figure: Figure) -> str:
    """A picture as text, for the `src` of an image: `data:image/png;base64,…`."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return base64.b64encode(file.getvalue()).decode()


def draw(report: MergeReport) -> Figure:
    """Residuals as a heatmap of layers and tasks, and beside it the conflicts and where inputs go."""
    squares: list[tuple[str, list[list[float]], Sequence[str]]] = []
    if report.conflicts is not None and len(report.tasks) > 1:
        squares.append(("conflicts", report.conflicts.tolist(), report.tasks))
    for name, expected in report.routing.items():
        title = f"where inputs go\nby {expected.by}" if name == GATES else f"where images go\n{name}"
        squares.append((title, expected.matrix, list(expected.shares)))
    tasks, layers = len(report.tasks), len(report.layers)
    side = max(2.6, 0.5 * tasks)
    height = max(4.0, min(0.16 * layers, 16.0), (side + 1.2) * len(squares))
    figure = Figure(figsize=(3.2 + 0.5 * tasks + (side + 1.8 if squares else 0), height), layout="constrained")
    grid = figure.add_gridspec(max(len(squares), 1), 2 if squares else 1)
    _draw_residuals(figure.add_subplot(grid[:, 0]), report)
    for place, (title, values, names) in enumerate(squares):
        _draw_square(figure.add_subplot(grid[place, 1]), title, values, names)
    return figure


def _draw_square(axis: Axes, title: str, values: list[list[float]], names: Sequence[str]) -> None:
    """A heatmap of tasks by tasks; what is not known, as the diagonal of conflicts, stays empty."""
    # From 0 to 1 whatever is found: a small number is no dark field.
    axis.imshow(values, cmap="YlOrRd" if title == "conflicts" else "YlGn", vmin=0, vmax=1)
    for i, row in enumerate(values if len(names) <= 16 else []):
        for j, value in enumerate(row):
            if value == value:
                colour = "white" if value > 0.7 else "black"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_title(title, fontsize=9)
    axis.set_yticks(range(len(names)), [shortened(name) for name in names], fontsize=7)
    _name_columns(axis, names)


def _name_columns(axis: Axes, names: Sequence[str]) -> None:
    short = [shortened(name) for name in names]
    axis.set_xticks(range(len(names)), short, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)


def _draw_residuals(axis: Axes, report: MergeReport) -> None:
    residuals = report.residuals.numpy()
    image = axis.imshow(residuals, aspect="auto", cmap="YlOrRd", vmin=0, vmax=1, interpolation="nearest")
    assert axis.figure is not None
    axis.figure.colorbar(image, ax=axis, shrink=0.5, pad=0.02, extend="max")
    axis.set_title("residual by layer and task", fontsize=9)
    _name_columns(axis, report.tasks)
    places = _labelled(report.layers)
    axis.set_yticks(list(places), list(places.values()), fontsize=6)


def _labelled(layers: Sequence[str]) -> dict[int, str]:
    """Which rows get a label: all of few layers, else the first of each block."""
    parts = [layer.split(".") for layer in layers]
    shared = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts))))
    short = [".".join(part[shared:] or part[-1:]) for part in parts]
    if len(layers) <= 64:
        return dict(enumerate(short))
    found: dict[str, int] = {}
    for place, name in enumerate(short):
        block = re.match(r"\D*\d+", name)
        found.setdefault(block.group() if block else name, place)
    return {place: block for block, place in found.items()}


def _row(report: MergeReport, t: int) -> list[str]:
    residuals = report.residuals[:, t].nan_to_num(-1.0)
    worst = int(residuals.argmax())
    rival = ""
    if report.conflicts is not None and len(report.tasks) > 1:
        by = int(report.conflicts[t].nan_to_num(0.0).argmax())
        rival = f"{shortened(report.tasks[by])} ({report.conflicts[t, by]:.2f})"
    return [
        shortened(report.tasks[t]),
        f"{(share := report.interference[report.tasks[t]]):.3f}, {amount(share)}",
        f"{report.residuals[worst, t]:.3f}, {report.layers[worst]}",
        rival,
        f"{report.output_ranks[:, t].nanmean():.1f}",
        f"{report.input_ranks[:, t].nanmean():.1f}",
        decimal(report.statistics_bytes[report.tasks[t]]),
    ]
