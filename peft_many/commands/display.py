"""What is said to people: tables of what a merge would be, and of what an adapter is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..files.card import in_words
from ..records import ExpectedRouting, most_telling
from ..records.options import BOTH
from ..reports.asking import Answer
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
    _show_table(f"{len(plan.tasks)} tasks to merge", rows)
    _say(_pairs("Options", plan.options or {}))
    _say(
        f"{plan.layers} layers of rank {_span(plan.ranks)}, {plan.groups} problems to solve; the weights file "
        f"has {decimal(plan.output_bytes)}. Arithmetic: {2e-9 * plan.multiplications:,.0f} Gflop in float64."
    )
    _show_routing(plan.routing or {}, doubts=False)
    for note in plan.notes:
        _say(f"• {note}")


def show_inspection(found: AdapterInspection) -> None:
    """One adapter or merge."""
    of_tasks = f" of {len(found.tasks)} tasks" if found.tasks else ""
    kind = f"a merge{of_tasks}" if found.is_merge else "the adapter of one task"
    at = f" at {found.revision}" if found.revision else ""
    _say(Text.assemble((found.name, "bold"), f"{at}: {kind} ({found.peft_type})"))
    _say(
        f"Base model {found.base_model or 'not named'}; {found.layers} layers of rank {_span(found.ranks)}, "
        f"{found.parameters:,} parameters in {found.dtype}."
    )
    if found.problem is not None:
        _say(f"It cannot be merged: {found.problem}")
    _say(_pairs("Files", {name: decimal(count) for name, count in found.files.items()}))
    if found.options:
        _say(_pairs("Options", found.options))
    for projector, tasks in found.routing.items():
        _say(f"Routed projector {projector}: {', '.join(tasks)}")
    if found.options.get("gate_lora"):
        by = "images and instructions" if found.options["gate_by"] == BOTH else found.options["gate_by"]
        _say(f"Gated LoRA: each input gets its task's own, by its {by}")
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
            "instructions": f"{task.instructions}, width {task.instruction_width}" if task.instructions else "0",
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
    rows = [{"task": task, "mean over layers": f"{share:.3f}"} for task, share in report.interference.items()]
    _show_table("Residual: share of a task's outputs that merging changes", rows)
    for one, two, residual in report.conflicting_pairs():
        _say(f"• '{one}' and '{two}' contradict each other: {residual:.3f}")
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
        lost = ", ".join(f"{task} {points:.1f}" for task, points in found.forgotten.items())
        _say(f"Points that each task's adapter alone has more than the merge: {lost}")


def _shares(weights: Mapping[str, float]) -> str:
    """What has a weight, the largest first."""
    told = sorted(((weight, name) for name, weight in weights.items() if weight >= 0.005), key=lambda one: -one[0])
    return ", ".join(f"{name} {weight:.0%}" for weight, name in told)


def show_doubts(routing: Mapping[str, ExpectedRouting]) -> None:
    """After a merge, where results do not go: tasks that its routing can hardly tell apart."""
    for name, expected in most_telling(routing).items():
        for line in expected.doubts(name):
            Console(stderr=True).print(f"Note: {line}", markup=False, highlight=False, soft_wrap=True)


def _show_routing(routing: Mapping[str, ExpectedRouting], doubts: bool = True) -> None:
    """Where inputs are expected to go, in sentences."""
    for name, expected in most_telling(routing).items():
        lines = expected.in_words(name)
        for place, line in enumerate(lines if doubts else lines[:1]):
            _say(f"• {line}" if place else line)


def _say(text: str | Text) -> None:
    """Print a line. Names in it may be anybody's, so it is no markup."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _show_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row.values()))
    Console().print(table)


def _span(ends: tuple[int, int] | None) -> str:
    """A number, or two if they differ."""
    if ends is None:
        return ""
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}–{ends[1]}"


def _pairs(title: str, values: Mapping[str, Any]) -> str:
    return f"{title}: " + ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
