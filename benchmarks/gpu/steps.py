"""Steps one after the other: what each found is on disk at once, and one that fails does not end the others."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common import write_json


class SkippedError(Exception):
    """A step, or a part of it, cannot be done here; the message says why."""


@dataclass
class Record:
    """What a step found. The step notes it as it goes, so that nothing is lost by a failure after it.

    Args:
        save (`Callable`): Called whenever something was noted.
        numbers (`dict`): What was measured, by name.
        checks (`dict`): By what was compared, how far it was `off` and how far it may be at `most`.
        skipped (`dict`): By part, why it was not done.
    """

    save: Callable[[], None] = lambda: None
    status: str = "running"
    seconds: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    why: str | None = None

    def number(self, name: str, value: Any) -> None:
        """Note what was measured."""
        self.numbers[name] = value
        self.save()

    def check(self, what: str, found: Any, expected: Any, most: float) -> None:
        """Compare tensors by the norm of their difference, relative to the expected one's; or the worst of several."""
        pairs = [(found[name], right) for name, right in expected.items()] if isinstance(expected, Mapping) else None
        off = max(relative(*pair) for pair in pairs or [(found, expected)])
        self.checks[what] = {"off": off, "most": most}
        self.save()

    def skip(self, part: str, why: str) -> None:
        """Note that a part is not done here."""
        self.skipped[part] = why
        self.save()

    @property
    def wrong(self) -> list[str]:
        """What was further off than it may be; NaN is."""
        return [what for what, found in self.checks.items() if not found["off"] <= found["most"]]

    def to_json(self) -> dict[str, Any]:
        """What is worth telling."""
        told = {"numbers": self.numbers, "checks": self.checks, "skipped": self.skipped, "why": self.why}
        return {"status": self.status, "seconds": self.seconds} | {
            name: value for name, value in told.items() if value
        }


def relative(found: Tensor, expected: Tensor) -> float:
    """`‖found − expected‖ / ‖expected‖`, computed in float64 on the CPU."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@dataclass(frozen=True)
class Step:
    """Something to find out.

    Args:
        name (`str`): What it is called.
        work (`Callable`): Does it, given the lab and the record.
        share (`float`): How many seconds it may take on a GPU; with fewer left it is not begun.
        attempt (`bool`): Whether it may turn out to be impossible by no fault of ours.
    """

    name: str
    work: Callable[[Any, Record], None]
    share: float
    attempt: bool = False


@dataclass
class Run:
    """All steps, within a budget of seconds.

    Args:
        path (`Path`): The JSON file to write.
        about (`dict`): What else it says.
        budget (`float`): Seconds, from now on.
        tell (`Callable`): Called with a line for each step.
        tidy (`Callable`): Called after each step, to free memory.
    """

    path: Path
    about: dict[str, Any]
    budget: float
    tell: Callable[[str], Any]
    tidy: Callable[[], Any]
    in_miniature: bool = False
    records: dict[str, Record] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    def save(self) -> None:
        """Write what is known so far."""
        steps = {name: record.to_json() for name, record in self.records.items()}
        write_json(self.path, {**self.about, "seconds": round(self.elapsed, 1), "steps": steps})

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def all(self, steps: Sequence[Step], lab: Any) -> None:
        """Do the steps for which there is time."""
        for step in steps:
            record = self.records[step.name] = Record(self.save)
            self.save()
            left = self.budget - self.elapsed
            if left < (0 if self.in_miniature else step.share):
                record.status = "skipped"
                record.why = f"it may take {step.share:.0f} s, and {max(0.0, left):.0f} s of the budget are left"
            else:
                self._do(step, lab, record)
            self.save()
            self.tell(_line(self.elapsed, step.name, record))

    def _do(self, step: Step, lab: Any, record: Record) -> None:
        start = time.perf_counter()
        try:
            step.work(lab, record)
            record.status = "wrong" if record.wrong else "done"
        except SkippedError as reason:
            record.status, record.why = "skipped", str(reason)
        except Exception as error:  # of any step, so that the others are done
            record.status = "not possible" if step.attempt else "failed"
            record.why = f"{type(error).__name__}: {error}" if step.attempt else traceback.format_exc()
        record.seconds = round(time.perf_counter() - start, 2)
        self.tidy()

    @property
    def went_well(self) -> bool:
        """Whether nothing failed and nothing was wrong."""
        return all(record.status not in ("failed", "wrong") for record in self.records.values())


def _line(elapsed: float, name: str, record: Record) -> str:
    told = [f"[{elapsed:6.1f} s] {name}: {record.status}"]
    told += [f"    {what} is off by {record.checks[what]['off']:.2g}" for what in record.wrong]
    told += [f"    {part} skipped: {why}" for part, why in record.skipped.items()]
    if record.why is not None:
        told.append("    " + record.why.rstrip().replace("\n", "\n    "))
    return "\n".join(told)
