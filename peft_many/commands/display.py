"""What is said to people: tables of what a merge would be, and of what an adapter is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..files.card import in_words
from ..records import ExpectedRouting, MergeRecord, most_telling
from ..records.options import BOTH, IMAGES
from ..records.words import counted, shortened
from ..reports.asking import Answer
from ..reports.costs import amount
from ..reports.evaluation import Evaluation
from ..reports.inspection import AdapterInspection
from ..reports.plan import MergePlan
from ..reports.report import MergeReport
from .running import say_error


def show_plan(plan: MergePlan) -> None:
    """The plan of a merge, or why it cannot be made."""
    for problem in plan.problems:
        say_error(problem)
    if plan.problems:
        return
    rows = [
        {
            "task": task.name,
            "from": task.source,
            "weight": f"{task.weight:g}",
            "layers": str(task.layers),
            "rank": _span(task.ranks),
            "samples": str(task.samples) if task.samples else "not measured",
            "images": str(task.images),
            "instructions": str(task.instructions),
            "own projector": "yes" if task.projectors else "no",
        }
        for task in plan.tasks
    ]
    _show_table(f"{counted(len(plan.tasks), 'task')} to merge", rows)
    _say(_pairs("Options", plan.options or {}))
    _say(
        f"{counted(plan.layers, 'layer')} of rank {_span(plan.ranks)}, {counted(plan.groups, 'problem')} to solve; "
        f"the weights file will have {decimal(plan.output_bytes)}. Arithmetic: "
        f"{2e-9 * plan.multiplications:,.0f} Gflop in float64."
    )
    _show_routing(plan.routing or {}, doubts=False)
    for note in plan.notes:
        _say(f"• {note}")


def show_inspection(found: AdapterInspection) -> None:
    """One adapter or merge."""
    of_tasks = f" of {counted(len(found.tasks), 'task')}" if found.tasks else ""
    kind = f"a merge{of_tasks}" if found.is_merge else "the adapter of one task"
    at = f" at {found.revision}" if found.revision else ""
    _say(Text.assemble((found.name, "bold"), f"{at}: {kind} ({found.peft_type})"))
    _say(
        f"Base model {found.base_model or 'not named'}; {counted(found.layers, 'layer')} of rank "
        f"{_span(found.ranks)}, {found.parameters:,} parameters in {found.dtype}."
    )
    if found.problem is not None:
        _say(f"It cannot be merged: {found.problem}")
    _say(_pairs("Files", {name: decimal(count) for name, count in found.files.items()}))
    if found.options:
        _say(_pairs("Options", found.options))
    goes_by = {name: "images and instructions" if by == BOTH else by for name, by in found.options.items()}
    for projector, tasks in found.routing.items():
        _say(f"Routed projector {projector}, by {goes_by.get('route_by', IMAGES)}: {', '.join(tasks)}")
    if found.options.get("gate_lora"):
        _say(f"Gated LoRA: each input chooses among the tasks' own, by its {goes_by['gate_by']}")
    _show_routing(found.expected_routing)
    for projector, tasks in found.averaged_projectors.items():
        _say(f"Averaged projector {projector}: {', '.join(tasks)}")
    if found.tasks:
        _show_provenance(found)
        _show_statistics(found)
    for task in found.tasks:
        if task.pooled:
            _say(f"{task.name} is a pool of {', '.join(task.pooled)}")
    for place, done in enumerate(found.operations, start=1):
        _say(f"{place}. {in_words(done)}")


def _show_provenance(found: AdapterInspection) -> None:
    rows = [
        {
            "task": task.name,
            "weight": f"{task.weight:g}",
            "from": task.source,
            "revision": (task.revision or "")[:8],
            "sha256": task.sha256[:8],
            "layers": str(task.layers),
            "rank": _span(task.ranks),
            "own projector": "yes" if task.projectors else "no",
            "interference": "" if task.interference is None else f"{task.interference:.3f}",
        }
        for task in found.tasks
    ]
    _show_table("Tasks", rows)


def _show_statistics(found: AdapterInspection) -> None:
    rows = [
        {
            "task": task.name,
            "samples": str(task.samples) if task.covariances or task.prototypes else "not measured",
            "images": str(task.images),
            "instructions": str(task.instructions),
            "prompts kept": str(task.prompts),
            "inputs": str(task.covariances),
            "directions": _span(task.covariance_ranks),
            "energy": "" if task.energy is None else f"{task.energy:.5f}",
            "size": decimal(task.covariance_bytes),
            "routers": "both" if task.spreads else "cosine" if task.prototypes else "none",
        }
        for task in found.tasks
    ]
    _show_table("Statistics", rows)


def show_report(report: MergeReport) -> None:
    """What merging costs each task, and which tasks contradict each other most."""
    _show_residuals(report.interference)
    for line in report.conflicts_in_words():
        _say(f"• {line}")
    _show_routing(report.routing)


def show_answer(found: Answer) -> None:
    """A merge's answer, why it is that, and what others said."""
    _say(found.answer)
    for projector, weights in found.routing.items():
        _say(f"• Images went through the projectors of: {_shares(weights)} ({projector})")
    if found.gate:
        _say(f"• The LoRA was that of: {_shares(found.gate)}")
    for name, answer in found.others.items():
        _say(f"• {name}: {answer}")


def show_evaluation(found: Evaluation) -> None:
    """Who answers which task how well, in per cent."""
    mean = found.mean
    rows = [
        {
            "": who,
            **{task: f"{row[task]:.1f}" if task in row else "" for task in found.metrics},
            "mean": f"{mean[who]:.1f}" if who in mean else "",
            **({"perplexity": f"{found.perplexity.get(who, float('nan')):.3f}"} if found.perplexity else {}),
        }
        for who, row in found.scores.items()
    ]
    counts = ", ".join(f"{task} {found.questions[task]} ({metric})" for task, metric in found.metrics.items())
    _show_table("Scores in per cent", rows)
    _say(f"Questions: {counts}")
    if found.forgotten:
        changed = ", ".join(f"{task} {round(-points, 1) + 0.0:+.1f}" for task, points in found.forgotten.items())
        _say(f"The merge compared with each task's adapter alone, in points: {changed}")


def _shares(weights: Mapping[str, float]) -> str:
    """What has a weight, the largest first."""
    told = sorted(((weight, name) for name, weight in weights.items() if weight >= 0.005), key=lambda one: -one[0])
    return ", ".join(f"{name} {weight:.0%}" for weight, name in told) or "no task: the input resembles none of them"


def show_merged(merge: MergeRecord, folder: str) -> None:
    """After a merge, where results do not go: what it costs each task, where images go, and what to do next."""
    aside = Console(stderr=True)
    residuals = {task.name: task.interference for task in merge.tasks if task.interference is not None}
    if residuals:
        _show_residuals(residuals, aside)
    if merge.averaged_projectors:
        _say("All images go through the mean of the tasks' projectors.", aside)
    _show_routing(merge.expected_routing, console=aside)
    place = shlex.quote(folder)
    _say(f"What it is made of: peft-many inspect {place}", aside)
    _say(f"What it costs, layer by layer: peft-many report {place} --output {shlex.quote(folder + '-report')}", aside)
    _say(f"To ask it: peft-many ask {place} --image IMAGE QUESTION", aside)


def _show_residuals(residuals: Mapping[str, float], console: Console | None = None) -> None:
    """What merging costs each task."""
    rows = [
        {"task": task, "residual": f"{share:.3f}", "merging changes": amount(share)}
        for task, share in residuals.items()
    ]
    title = (
        "How merging changes the outputs of each task's LoRA: residual 0 is not at all, 1 is as if the LoRA were lost"
    )
    _show_table(title, rows, console)


def _show_routing(routing: Mapping[str, ExpectedRouting], doubts: bool = True, console: Console | None = None) -> None:
    """Where inputs are expected to go, in sentences."""
    for name, expected in most_telling(routing).items():
        lines = expected.in_words(name)
        for place, line in enumerate(lines if doubts else lines[:1]):
            _say(f"• {line}" if place else line, console)


def _say(text: str | Text, console: Console | None = None) -> None:
    """Print a line. Names in it may be anybody's, so it is no markup."""
    (console or Console()).print(text, markup=False, highlight=False, soft_wrap=True)


def _show_table(title: str, rows: Sequence[Mapping[str, str]], console: Console | None = None) -> None:
    """Print a table, or where the terminal is too narrow for it a paragraph for each row; no word is broken."""
    console = console or Console()
    _say(Text(title, "italic"), console)
    longest = min(40, console.width // 2)
    shown = [{column: shortened(cell, longest) for column, cell in row.items()} for row in rows]
    told = [
        column
        for column in shown[0]
        if any(row[column] for row in shown) and (column != "from" or any(row["from"] != row["task"] for row in shown))
    ]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in told:
        table.add_column(column, no_wrap=True)
    for row in shown:
        table.add_row(*(escape(row[column]) for column in told))
    if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
        console.print(table)
        return
    first, *others = told
    for row in shown:
        about = ", ".join(f"{column} {row[column]}" for column in others if row[column])
        console.print(Padding(Text.assemble((row[first], "bold"), f": {about}"), (0, 0, 0, 2)), highlight=False)
    console.print()


def _span(ends: tuple[int, int] | None) -> str:
    """A number, or two if they differ."""
    if ends is None:
        return ""
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}–{ends[1]}"


def _pairs(title: str, values: Mapping[str, Any]) -> str:
    return f"{title}: " + ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
