"""What is said to people: tables of what a merge would be, and of what an adapter is."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..files.card import in_words
from ..reports.inspection import AdapterInspection
from ..reports.plan import MergePlan
from ..reports.report import MergeReport
from .running import say_error


def size(count: float) -> str:
    """Bytes, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def span(ends: tuple[int, int] | None) -> str:
    """A number, or two if they differ."""
    if ends is None:
        return ""
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}–{ends[1]}"


def show_plan(plan: MergePlan) -> None:
    """The plan of a merge, or why it cannot be made."""
    for problem in plan.problems:
        say_error(problem)
    if plan.problems:
        return
    console = Console()
    title = f"{len(plan.tasks)} tasks to merge"
    table = _table(title, "task", "from", "weight", "layers", "rank", "samples", "images", "own projector")
    for task in plan.tasks:
        table.add_row(
            escape(task.name),
            escape(task.source),
            f"{task.weight:g}",
            str(task.layers),
            span(task.ranks),
            str(task.samples) if task.samples else "not measured",
            str(task.images),
            "yes" if task.projectors else "no",
        )
    console.print(table)
    options = plan.options or {}
    console.print(_pairs("Options", options), highlight=False, soft_wrap=True)
    console.print(
        f"{plan.layers} layers of rank {span(plan.ranks)}, {plan.groups} problems to solve; the weights file "
        f"has {size(plan.output_bytes)}. Arithmetic: {2e-9 * plan.multiplications:,.0f} Gflop in float64.",
        highlight=False,
        soft_wrap=True,
    )
    for note in plan.notes:
        console.print(f"• {escape(note)}", highlight=False, soft_wrap=True)


def show_inspection(found: AdapterInspection) -> None:
    """One adapter or merge."""
    console = Console()
    kind = f"a merge of {len(found.tasks)} tasks" if found.is_merge else "the adapter of one task"
    at = f" at {found.revision}" if found.revision else ""
    console.print(f"[bold]{escape(found.name)}[/]{at}: {kind} ({found.peft_type})", highlight=False, soft_wrap=True)
    console.print(
        f"Base model {escape(found.base_model or 'not named')}; {found.layers} layers of rank {span(found.ranks)}, "
        f"{found.parameters:,} parameters in {found.dtype}.",
        highlight=False,
        soft_wrap=True,
    )
    files = {name: size(count) for name, count in found.files.items()}
    console.print(_pairs("Files", files), highlight=False, soft_wrap=True)
    if found.options:
        console.print(_pairs("Options", found.options), highlight=False, soft_wrap=True)
    for projector, tasks in found.routing.items():
        console.print(f"Routed projector {projector}: {escape(', '.join(tasks))}", highlight=False, soft_wrap=True)
    for projector, tasks in found.averaged_projectors.items():
        console.print(f"Averaged projector {projector}: {escape(', '.join(tasks))}", highlight=False, soft_wrap=True)
    console.print(_provenance(found))
    for task in found.tasks:
        if task.pooled:
            console.print(
                f"{escape(task.name)} is a pool of {escape(', '.join(task.pooled))}", highlight=False, soft_wrap=True
            )
    console.print(_statistics(found))
    for place, done in enumerate(found.operations, start=1):
        console.print(f"{place}. {escape(in_words(done))}", highlight=False, soft_wrap=True)


def show_report(report: MergeReport) -> None:
    """What merging costs each task, and which tasks contradict each other most."""
    console = Console()
    table = _table("Residual: share of a task's outputs that merging changes", "task", "mean over layers")
    for task, share in report.interference.items():
        table.add_row(escape(task), f"{share:.3f}")
    console.print(table)
    for one, two, residual in report.conflicting_pairs():
        console.print(
            f"• '{escape(one)}' and '{escape(two)}' contradict each other: {residual:.3f}",
            highlight=False,
            soft_wrap=True,
        )


def _provenance(found: AdapterInspection) -> Table:
    columns = ["task", "weight", "from", "revision", "sha256", "layers", "rank", "own projector", "interference"]
    table = _table("Tasks", *columns)
    for task in found.tasks:
        table.add_row(
            escape(task.name),
            f"{task.weight:g}",
            escape(task.source),
            escape((task.revision or "")[:8]),
            task.sha256[:8],
            str(task.layers),
            span(task.ranks),
            "yes" if task.projectors else "no",
            "" if task.interference is None else f"{task.interference:.3f}",
        )
    return table


def _statistics(found: AdapterInspection) -> Table:
    table = _table("Statistics", "task", "samples", "images", "inputs", "directions", "energy", "size", "routers")
    for task in found.tasks:
        table.add_row(
            escape(task.name),
            str(task.samples) if task.covariances or task.prototypes else "not measured",
            str(task.images),
            str(task.covariances),
            span(task.covariance_ranks),
            "" if task.energy is None else f"{task.energy:.5f}",
            size(task.covariance_bytes),
            "both" if task.spreads else "cosine" if task.prototypes else "none",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _pairs(title: str, values: dict[str, Any]) -> str:
    given = {name: value for name, value in values.items() if value is not None}
    return f"{title}: " + ", ".join(f"{name} {escape(str(value))}" for name, value in given.items())
