"""What chooses among the tasks' LoRAs, and the methods of the hard half, where images alone cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .methods import METHODS, Answerer, Measured, Measurement, Method, merged, same
from .workshop import Workshop

GATED, HARD = "gated by", "the hard half"
ABSTAIN_ABOVE = 3.0
_BOTH = {"gate_by": "both", "route_by": "both"}
_HARD = (
    *("zero-shot", "alone", "average", "ties", "regmean", "MAny", "MAny, Gaussian router"),
    *("refitted to outputs, Gaussian router", "LPM, own projector", "own LoRA, CPM by Gaussian router"),
)


@dataclass(frozen=True)
class WhenLearnt(Measurement):
    """Each task right after its adapter joined the merge: what a method forgets is this less what is left at the end.

    Args:
        method ([`Method`]): Of merging.
    """

    method: Method

    def measure(self, shop: Workshop) -> Measured:
        stages = enumerate(shop.tasks, start=1)
        return Measured([[shop.accuracy(self.method.after(shop, stage)(task), task) for stage, task in stages]])


def _gated(shop: Workshop, stage: int, **options: Any) -> Answerer:
    return same(merged(shop, stage, router="gaussian", gate_lora=True, **options))


def gates() -> Iterator[Method]:
    """Gated merges, by what a row's gate looks at, and one that leaves images like no task's."""
    about = "A gated LoRA and the Gaussian router; rows are told apart by their {}."
    left = {"abstain_above": ABSTAIN_ABOVE}
    yield Method("gated by images", GATED, about.format("images"), _gated)
    yield Method("gated by images, abstaining", GATED, "Rows like no task's are left.", partial(_gated, **left))
    for gate_by, what in (("instructions", "instructions"), ("both", "images and instructions")):
        yield Method(f"gated by {gate_by}", GATED, about.format(what), partial(_gated, gate_by=gate_by))
    both = partial(_gated, **_BOTH)
    yield Method("gated and routed by both", GATED, "Instructions choose the projector too.", both)
    after = partial(_gated, **_BOTH, **left)
    yield Method("gated and routed by both, abstaining", GATED, "As above; rows like no task's are left.", after)


def hard_methods() -> Iterator[Measurement]:
    """What the hard half asks, after the last task only."""
    lower = partial(_gated, **_BOTH, abstain_above=2.0)
    leaving_more = Method("gated and routed by both, abstaining above 2", GATED, "More rows are left.", lower)
    for method in (*(METHODS[name] for name in _HARD), *gates(), leaving_more):
        yield replace(method, group=HARD, every_stage=False)
    last = [*gates()][-1]
    yield WhenLearnt(f"{last.name}, when just learnt", HARD, "Each task right after it joined the merge.", last)
