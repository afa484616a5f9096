"""Asks each method's model all tasks' questions, and what the base model knew before."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from peft_many.reports.perplexity import perplexity_of

from .learning import autocast
from .messages import find_tasks
from .methods import METHODS, VARIANTS, Method
from .skills import prose

if TYPE_CHECKING:
    from .run import Bench


def chosen(names: Sequence[str] | None = None) -> list[Method]:
    """The methods of these names, in the table's order; all if none is given, but no variants.

    Raises:
        ValueError: There is no method of a name.
    """
    every = {**METHODS, **VARIANTS}
    unknown = [name for name in names or () if name not in every]
    if unknown:
        raise ValueError(f"There is no method {unknown[0]!r}; there are {'; '.join(every)}.")
    return [*METHODS.values()] if names is None else [method for name, method in every.items() if name in names]


def compare(bench: Bench, names: Sequence[str] | None = None) -> None:
    """Record what each of the methods, or those of these names, knows of the tasks and of what was before them."""
    for method in chosen(names):
        bench.records.record(f"methods/{method.name}/{bench.named}", lambda method=method: _measured(bench, method))


def _measured(bench: Bench, method: Method) -> dict[str, Any]:
    answerer = method.make(bench)
    found: dict[str, dict[str, Any]] = {"scores": {}, "answers": {}}
    skills: dict[str, list[float]] = {}
    model = None
    for task in bench.tasks():
        before, model = model, answerer(task)
        if method.is_known:
            known = bench.records[f"alone/{task.name}"]
            found["scores"][task.name] = (known["zero_shot"] if method.name == "zero-shot" else known)["score"]
        else:
            asked = bench.asked(model, bench.collator, task)
            found["scores"][task.name], found["answers"][task.name] = asked["score"], asked["answers"]
        if model is not before:
            for skill, value in _skills(bench, model).items():
                skills.setdefault(skill, []).append(value)
    return {**found, "skills": {skill: fmean(values) for skill, values in skills.items()}}


def _skills(bench: Bench, model: Any) -> dict[str, float]:
    """The perplexity of prose; and of a base model that was aligned here, how well it still describes pictures."""
    collator = bench.collator
    with autocast(model.device):
        found = {"perplexity": perplexity_of(model, collator.processor.tokenizer, prose())}
    if bench.captions is not None:
        (task,) = find_tasks(bench.captions)
        found["captions"] = bench.asked(model, collator, task)["score"]
    return found
