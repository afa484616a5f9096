"""`ExpectedRouting`: where the inputs of each task are expected to go in a merge, and that in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .base import Number, Record
from .options import BOTH, IMAGES, INSTRUCTIONS
from .words import counted

GATES = "gate_lora"  # in the place of a projector's path
# Two tasks are named as hard to tell apart where one takes this much of what the other itself, or who has most, gets.
_ALIKE = 0.1
_MOST_NAMED = 5
_SAME = {
    IMAGES: "look alike",
    INSTRUCTIONS: "ask alike",
    BOTH: "are hard to tell apart by images and instructions",
}


@dataclass(frozen=True)
class ExpectedRouting(Record):
    """Where inputs that are like those a task was measured on would go; no model is run to tell.

    Args:
        by (`str`): What decides: `"images"`, `"instructions"` or `"both"`.
        shares (`dict[str, dict[str, float]]`):
            By task, the mean weight that its inputs would have for it and for others, of a gate the share of them that
            it gives to these; where it cannot decide, their weights count. A merge's config keeps 1 % and more.
        undecided (`dict[str, float]`):
            By task, the share of its inputs that a gate would give the merged LoRA.
        like_none (`dict[str, float]`):
            By task, the share of its inputs that would seem like no task's, and be left to the base model.
    """

    by: str
    shares: dict[str, dict[str, Number]]
    undecided: dict[str, Number] = field(default_factory=dict)
    like_none: dict[str, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in _SAME or {*self.undecided, *self.like_none} - self.shares.keys():
            raise ValueError(f"an expected routing by {self.by!r:.40} does not fit together")

    @property
    def names(self) -> set[str]:
        """All tasks that are named."""
        return set(self.shares).union(*self.shares.values())

    @property
    def accuracy(self) -> float:
        """The weight that inputs would have for their own task, the mean over the tasks."""
        return sum(self.share(task, task) for task in self.shares) / max(1, len(self.shares))

    def share(self, of: str, to: str) -> float:
        """The mean weight that inputs of one task would have for another."""
        return float(self.shares[of].get(to, 0.0))

    @property
    def matrix(self) -> list[list[float]]:
        """All shares, tasks by tasks."""
        return [[self.share(of, to) for to in self.shares] for of in self.shares]

    def look_alikes(self) -> list[tuple[str, str]]:
        """The pairs of tasks that are hard to tell apart, the hardest first."""
        found: dict[tuple[str, str], float] = {}
        order = {task: place for place, task in enumerate(self.shares)}
        for of, row in self.shares.items():
            least = _ALIKE * max(row.values(), default=0.0)
            for to in [task for task, share in row.items() if share >= least > 0 and task in order and task != of]:
                pair = (of, to) if order[of] < order[to] else (to, of)
                found[pair] = max(found.get(pair, 0.0), row[to])
        return sorted(found, key=lambda pair: -found[pair])

    def kept(self) -> ExpectedRouting:
        """What a config keeps of it: what is 1 % and more, to a tenth of a percent."""
        shares = {task: _large(row) for task, row in self.shares.items()}
        return ExpectedRouting(self.by, shares, _large(self.undecided), _large(self.like_none))

    def in_words(self, routed: str) -> list[str]:
        """Sentences on what `routed` names: a projector, or `GATES`."""
        if len(self.shares) < 2:
            return []
        by = "images and instructions" if self.by == BOTH else self.by
        share, of = _percent(self.accuracy), f"mean over {len(self.shares)} tasks"
        if routed == GATES:
            head = f"Expected choice of the LoRA, by {by}: {share} of the inputs get their own task's ({of})."
        else:
            told = "" if self.by == IMAGES else f", by {by}"
            head = f"Expected routing of images at '{routed}'{told}: {share} go to their own task ({of})."
        return [head, *self.doubts(routed)]

    def doubts(self, routed: str) -> list[str]:
        """Of these sentences, those that say what goes wrong."""
        pairs = self.look_alikes()
        what = "inputs" if routed == GATES else "images"
        lines = [f"'{one}' and '{two}' {_SAME[self.by]}: {self._taken(one, two, what)}." for one, two in pairs]
        if len(pairs) > _MOST_NAMED:
            more = len(pairs) - _MOST_NAMED
            lines[_MOST_NAMED:] = [
                f"{counted(more, 'more pair')} of tasks {'is' if more == 1 else 'are'} hard to tell apart."
            ]
        left_out = "Inputs that are like no task's are left to the base model"
        if routed != GATES:
            of = "" if self.by == IMAGES else " of inputs"
            left_out = f"Images{of} that are like no task's pass the base model's projector"
        undecided = "Inputs that no task has half of the weight of get the merged LoRA"
        for said, shares in ((undecided, self.undecided), (left_out, self.like_none)):
            told = [f"{_percent(share)} of '{task}'" for task, share in shares.items() if share >= _ALIKE]
            lines += [f"{said}: {', '.join(told)}."] if told else []
        return lines

    def _taken(self, one: str, two: str, what: str) -> str:
        shares = {(one, two): self.share(two, one), (two, one): self.share(one, two)}  # by who takes from whom
        (taker, giver), (other, _) = sorted(shares, key=lambda pair: -shares[pair])
        more, less = _percent(shares[taker, giver]), _percent(shares[other, taker])
        if more == less:
            return f"each takes {more} of the other's {what}"
        back = f", and '{other}' {less} of those of '{taker}'" if shares[other, taker] >= 0.01 else ""
        return f"'{taker}' takes {more} of the {what} of '{giver}'{back}"


def most_telling(routing: Mapping[str, ExpectedRouting]) -> dict[str, ExpectedRouting]:
    """What is worth saying in words: that of the last projector and of the gates, of these alone if both go by one."""
    gates = {name: found for name, found in routing.items() if name == GATES}
    said = [found.by for found in gates.values()]
    projectors = [name for name in routing if name != GATES and routing[name].by not in said]
    return {**{name: routing[name] for name in projectors[-1:]}, **gates}


def _large(shares: Mapping[str, Number]) -> dict[str, Number]:
    return {task: round(share, 3) for task, share in shares.items() if share >= 0.01}


def _percent(share: float) -> str:
    return f"{100 * round(share, 3):.0f} %"  # of what a config keeps the same
