"""The benchmark's report, from the results' JSON alone: one page, the tables as Markdown, the pictures as PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment
from matplotlib.figure import Figure

from peft_many.files.atomic import replace_file
from peft_many.reports.page import STYLE, embedded

from . import pictures
from .ablations import numbers
from .methods import BEYOND, MAIN, Measurement, Method
from .model import MODELS
from .run import SUITES, Results, all_methods
from .tables import METRICS, Table, tables_of

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Mini-UCIT</title>
<style>{{ style }}</style>
</head>
<body>
<h1>Mini-UCIT</h1>
<p>Exact-match accuracy in per cent on {{ tasks | join(", ") }}; each method has the same budget of training.
FAA is the average after the last task; {{ metrics | join(", ") }} are defined in <code>peft_many.metrics</code>.
“Base kept” is the accuracy on the base model's own questions, in per cent of what the base model has, on plain
pictures and on an unseen look; perplexity is that of answers to questions without pictures, as a multiple of the base
model's.
“±” is the standard deviation over seeds.</p>
{% for model in models %}
<h2>{{ model.name }}</h2>
<p>{{ model.about | capitalize }}.</p>
{% for table in model.tables %}
<h3>{{ table.title }}</h3>
<div class="wide"><table>
<tr>{% for cell in table.columns %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}
{% for title, picture in model.pictures %}
<h3>{{ title }}</h3>
<img alt="{{ title }}" src="data:image/png;base64,{{ picture }}">
{% endfor %}
{% endfor %}
<h2>The methods</h2>
<dl>
{% for method in methods %}<dt>{{ method.name }}</dt><dd>{{ method.about }}</dd>
{% endfor %}</dl>
<footer>{{ environment }}</footer>
</body>
</html>
"""


def read_results(folder: Path, suite: str = "six") -> dict[str, list[Results]]:
    """By model, in the benchmark's order, the results of all seeds that are in a folder; empty if there are none."""
    file = SUITES[suite].results_name
    found = {name: [Results.read(path) for path in sorted((folder / name).glob(f"seed*/{file}"))] for name in MODELS}
    return {name: sorted(runs, key=lambda run: run.about["seed"]) for name, runs in found.items() if runs}


def write_report(results: dict[str, list[Results]], output: Path, suite: str = "six") -> Path:
    """Write `report.html`, `tables.md` and the pictures of every model into a folder; returns the page.

    The files of the hard half are called `hard-report.html` and so on.
    """
    prefix = "" if suite == "six" else f"{suite}-"
    methods = list(all_methods(suite))
    output.mkdir(parents=True, exist_ok=True)
    models, markdown = [], []
    for name, runs in results.items():
        tables = list(tables_of(runs, methods))
        markdown += [table.markdown() for table in tables]
        drawn = _pictures(runs, methods)
        for title, figure in drawn.items():
            figure.savefig(output / f"{prefix}{name}-{title.replace(' ', '-')}.png", dpi=130)
        models.append(
            {
                "name": name,
                "about": MODELS[name].about,
                "tables": tables,
                "pictures": [(title.capitalize(), embedded(figure)) for title, figure in drawn.items()],
            }
        )
    first = next(iter(results.values()))[0]
    page = Environment(autoescape=True).from_string(_PAGE)
    text = page.render(
        style=STYLE,
        models=models,
        tasks=first.about["tasks"],
        metrics=[shown for name, shown in METRICS.items() if name != "faa"],
        methods=[method for method in methods if method.about],
        environment=json.dumps({**first.about, "environment": first.about["environment"]}),
    )
    page_path = output / f"{prefix}report.html"
    for path, content in ((page_path, text), (output / f"{prefix}tables.md", "\n".join(markdown))):
        with replace_file(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return page_path


def summary_of(runs: Sequence[Results], suite: str = "six") -> list[Table]:
    """The tables that a run shows in the terminal."""
    return list(tables_of(runs, list(all_methods(suite))))


def _pictures(runs: Sequence[Results], measurements: Sequence[Measurement]) -> dict[str, Figure]:
    methods = [one for one in measurements if isinstance(one, Method)]
    main = [method for method in methods if method.group in (MAIN, BEYOND)]
    drawn = {
        "accuracy matrices": pictures.matrices(runs, main),
        "forgetting": pictures.forgetting(runs, main),
        "ablations": pictures.ablations(runs, list(numbers())),
        "residuals": pictures.residuals(runs),
    }
    return {title: figure for title, figure in drawn.items() if figure is not None}
