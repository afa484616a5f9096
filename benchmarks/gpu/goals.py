"""What we want of a GPU, what cannot be beaten there, and the tables that show both beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from .steps import Record

GIB = 2**30


@dataclass(frozen=True)
class Goal:
    """A number that is to be small.

    Args:
        what (`str`): What it is of.
        step (`str`): Which step measures it,
        number (`str`): and what it is called there.
        floor (`float`, *optional*): What no program can be below.
        most (`float`): What it is to be at most.
        unit (`str`): Of all three.
        per (`float`): How many of what was noted make one of the unit.
        counted (`bool`): Whether it is counted, so that it means something in miniature and on a CPU too.
    """

    what: str
    step: str
    number: str
    floor: float | None
    most: float
    unit: str = "×"
    per: float = 1.0
    counted: bool = False

    def judged(self, records: Mapping[str, Record], in_miniature: bool) -> dict[str, Any]:
        """What was measured, and whether that is enough; `None` where it says nothing."""
        value = records[self.step].numbers.get(self.number) if self.step in records else None
        measured = None if value is None else value / self.per
        says = measured is not None and (self.counted or not in_miniature)
        told = {"what": self.what, "measured": measured, "floor": self.floor, "goal": self.most, "unit": self.unit}
        return {**told, "met": measured <= self.most if says else None}


_CALLING, _COLLECTING, _COMPILED = "calling", "collecting", "compiled"
GOALS = (
    Goal("collecting over the same forward passes, a batch", _COLLECTING, "over forward passes", 1.03, 1.10),
    Goal("finishing the statistics of a task", _COLLECTING, "finishing", 0.5, 1.0, "s"),
    Goal("memory that collecting adds", _COLLECTING, "memory added", 3.0, 4.0, "GiB", GIB),
    Goal("kernels for an input and batch", _COLLECTING, "kernels for an input and batch", None, 12, "", counted=True),
    Goal("merging six adapters, from disk to disk", "merging at full size", "merge", 3.0, 4.0, "s"),
    Goal("forward pass of a merge over one adapter's", _CALLING, "forward, merge over one adapter", 1.05, 1.08),
    Goal("the same, gated", _CALLING, "forward, gated over one adapter", 1.02, 1.06),
    Goal("generating with a merge over one adapter", _CALLING, "generate, merge over one adapter", 1.0, 1.05),
    Goal("the same, gated", _CALLING, "generate, gated over one adapter", 1.0, 1.05),
    Goal("a training step over PEFT LoRA's", "training", "over PEFT LoRA", 1.0, 1.02),
    Goal("a merge's graphs beyond PEFT LoRA's", _COMPILED, "plain, further graphs", 0, 0, "", counted=True),
)


def table_of_steps(records: Mapping[str, Record]) -> Table:
    """How each step went, and the check that came nearest to its limit."""
    table = Table("step", "status", "nearest to its limit", title="Steps")
    for heading in ("off by", "at most", "seconds"):
        table.add_column(heading, justify="right")
    for name, record in records.items():
        what, nearest = max(record.checks.items(), key=lambda item: _share(item[1]), default=("", None))
        found = (what, *("" if nearest is None else f"{nearest[key]:.2g}" for key in ("off", "most")))
        table.add_row(name, record.status, *found, f"{record.seconds:.1f}")
    return table


def table_of_goals(goals: list[dict[str, Any]]) -> Table:
    """What was measured beside what is wanted."""
    table = Table("cost", title="Costs")
    for heading in ("measured", "floor", "goal", "met"):
        table.add_column(heading, justify="right")
    for goal in goals:
        unit = f" {goal['unit']}" if goal["unit"] else ""
        numbers = ("" if goal[key] is None else f"{goal[key]:.3g}{unit}" for key in ("measured", "floor", "goal"))
        table.add_row(goal["what"], *numbers, {True: "yes", False: "no", None: ""}[goal["met"]])
    return table


def _share(check: Mapping[str, float]) -> float:
    return check["off"] / check["most"] if check["most"] else float(check["off"] > 0)
