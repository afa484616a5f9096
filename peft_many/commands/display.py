"""What is said to people: what a merge would be, what an adapter is, what a merge answers and costs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from rich.filesize import decimal
from rich.text import Text

from ..files.card import in_words
from ..records import ExpectedRouting, MergeRecord, most_telling
from ..records.options import BOTH, IMAGES
from ..records.words import counted
from ..reports.asking import Answer
from ..reports.costs import amount
from ..reports.evaluation import Evaluation
from ..reports.inspection import AdapterInspection
from ..reports.plan import MergePlan
from ..reports.report import MergeReport
from .running import say_error
from .tables import pairs, say, say_notes, show_table, span


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
            "rank": span(task.ranks),
            "samples": str(task.samples) if task.samples else "not measured",
            "images": str(task.images),
            "instructions": str(task.instructions),
            "own projector": "yes" if task.projectors else "no",
        }
        for task in plan.tasks
    ]
    show_table(f"A merge of {counted(len(plan.tasks), 'task')}", rows)
    say(pairs("Options", plan.options or {}))
    say(
        f"{counted(plan.layers, 'layer')} of rank {span(plan.ranks)}, {counted(plan.groups, 'problem')} to solve; "
        f"the weights file will have {decimal(plan.output_bytes)}. {_work(2e-9 * plan.multiplications)}"
    )
    _show_routing(plan.routing or {}, doubts=False)
    say_notes(plan.notes)


def _work(gigaflops: float) -> str:
    """How much there is to compute."""
    if gigaflops < 1:
        return "Arithmetic: less than 1 Gflop."
    return f"Arithmetic: {gigaflops:,.0f} Gflop in float64, of which a CPU core does 10 to 50 in a second."


def show_inspection(found: AdapterInspection) -> None:
    """One adapter or merge."""
    of_tasks = f" of {counted(len(found.tasks), 'task')}" if found.tasks else ""
    kind = f"a merge{of_tasks}" if found.is_merge else "the adapter of one task"
    at = f" at {found.revision}" if found.revision else ""
    say(Text.assemble((found.name, "bold"), f"{at}: {kind} ({found.peft_type})"))
    layers = f"{counted(found.layers, 'layer')} of rank {span(found.ranks)}, " if found.layers else ""
    say(f"Base model {found.base_model or 'not named'}; {layers}{found.parameters:,} parameters in {found.dtype}.")
    if found.problem is not None:
        say(f"It cannot be merged: {found.problem}")
    say(pairs("Files", {name: decimal(count) for name, count in found.files.items()}))
    if found.options:
        say(pairs("Options", found.options))
    goes_by = {name: "images and instructions" if by == BOTH else by for name, by in found.options.items()}
    for projector, tasks in found.routing.items():
        say(f"Routed projector {projector}, by {goes_by.get('route_by', IMAGES)}: {', '.join(tasks)}")
    if found.options.get("gate_lora"):
        say(f"Gated LoRA: each input chooses among the tasks' own, by its {goes_by['gate_by']}")
    _show_routing(found.expected_routing)
    for projector, tasks in found.averaged_projectors.items():
        say(f"Averaged projector {projector}: {', '.join(tasks)}")
    if found.tasks:
        _show_provenance(found)
        _show_statistics(found)
    for task in found.tasks:
        if task.pooled:
            say(f"{task.name} is a pool of {', '.join(task.pooled)}")
    if found.operations:
        say("What was done, in this order:")
    for place, done in enumerate(found.operations, start=1):
        say(f"{place}. {in_words(done)}")


def _show_provenance(found: AdapterInspection) -> None:
    rows = [
        {
            "task": task.name,
            "weight": f"{task.weight:g}",
            "from": task.source,
            "revision": (task.revision or "")[:8],
            "sha256": task.sha256[:8],
            "layers": str(task.layers),
            "rank": span(task.ranks),
            "own projector": "yes" if task.projectors else "no",
            "interference": "" if task.interference is None else f"{task.interference:.3f}",
        }
        for task in found.tasks
    ]
    show_table("Tasks", rows)


def _show_statistics(found: AdapterInspection) -> None:
    rows = [
        {
            "task": task.name,
            "samples": str(task.samples),
            "images": str(task.images),
            "instructions": str(task.instructions),
            "prompts kept": str(task.prompts),
            "covariances": str(task.covariances),
            "of rank": span(task.covariance_ranks),
            "energy": "" if task.energy is None else f"{task.energy:.5f}",
            "size": decimal(task.statistics_bytes),
            "for routers": "cosine, gaussian" if task.spreads else "cosine" if task.prototypes else "none",
        }
        for task in found.tasks
        if task.covariances or task.prototypes
    ]
    if rows:
        show_table("Statistics, which merging uses", rows)
        say("Energy is the share of the inputs' variance that covariances of this rank keep.")
    for task in found.tasks:
        if not task.covariances and not task.prototypes:
            say(f"'{task.name}' was not measured: `peft-many measure` does that, on data of the task.")


def show_report(report: MergeReport) -> None:
    """What merging costs each task, and which tasks contradict each other most."""
    _show_interference(report.interference)
    say_notes(report.conflicts_in_words())
    _show_routing(report.routing)


def show_answer(found: Answer, images: int) -> None:
    """A merge's answer to a question about some images, why it is that, and what others said."""
    say(found.answer)
    if found.cut_short:
        say("• The answer ran to the limit of its tokens (--max-new-tokens)")
    if not images:
        say("• There was no image to route (--image)")
    mean = f", the mean of {images} images" if images > 1 else ""
    for projector, weights in found.routing.items():
        say(f"• Images went through the projectors of: {_shares(weights)} ({projector}{mean})")
    if found.gate:
        say(f"• The LoRA was that of: {_shares(found.gate)}")
    for name, answer in found.others.items():
        say(f"• {name}: {answer}")


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
    show_table("Scores in per cent", rows)
    say(f"Questions: {counts}")
    cut = [f"{who} on {task} {n}" for who, by_task in found.cut_short.items() for task, n in by_task.items()]
    if cut:
        say(f"Answers that ran to the limit of their tokens (--max-new-tokens): {', '.join(cut)}")
    if found.forgotten:
        changed = ", ".join(f"{task} {round(-points, 1) + 0.0:+.1f}" for task, points in found.forgotten.items())
        say(f"The merge compared with each task's adapter alone, in points: {changed}")


def _shares(weights: Mapping[str, float]) -> str:
    """What has a weight, the largest first."""
    told = sorted(((weight, name) for name, weight in weights.items() if weight >= 0.005), key=lambda one: -one[0])
    shares = [f"{name} {100 * weight:.0f} %" for weight, name in told]
    return ", ".join(shares) or "no task: the input resembles none of them"


def show_merged(merge: MergeRecord, folder: str) -> None:
    """After a merge, where results do not go: what it costs each task, where images go, and what to do next."""
    interference = {task.name: task.interference for task in merge.tasks if task.interference is not None}
    if interference:
        _show_interference(interference, aside=True)
    if merge.averaged_projectors:
        say("All images go through the mean of the tasks' projectors.", aside=True)
    _show_routing(merge.expected_routing, aside=True)
    place = shlex.quote(folder)
    for line in (
        f"What it is made of: peft-many inspect {place}",
        f"What it costs, layer by layer: peft-many report {place} --output {shlex.quote(folder + '-report')}",
        f"To ask it: peft-many ask {place} --image IMAGE QUESTION",
    ):
        say(line, aside=True, whole=True)


def _show_interference(by_task: Mapping[str, float], aside: bool = False) -> None:
    """What merging costs each task."""
    rows = [
        {"task": task, "interference": f"{share:.3f}", "merging changes": amount(share)}
        for task, share in by_task.items()
    ]
    title = (
        "How far merging changes the outputs of each task's LoRA. Interference 0 is not at all, 1 as if the LoRA were "
        "lost"
    )
    show_table(title, rows, aside)


def _show_routing(routing: Mapping[str, ExpectedRouting], doubts: bool = True, aside: bool = False) -> None:
    """Where inputs are expected to go, in sentences."""
    for name, expected in most_telling(routing).items():
        head, *others = expected.in_words(name) or [""]
        if head:
            say(head, aside)
        say_notes(others if doubts else [], aside)
