"""Asks each method's model all tasks' questions, and what the base model knew before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_many.reports.perplexity import perplexity_of

from .learning import answers, autocast
from .messages import find_tasks
from .methods import METHODS, VARIANTS, Method
from .skills import overlap, prose

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
    accuracy: dict[str, float] = {}
    skills: dict[str, list[float]] = {}
    model = None
    for task in bench.tasks():
        before, model = model, answerer(task)
        if method.is_known:
            known = bench.records[f"alone/{task.name}"]
            accuracy[task.name] = (known["zero_shot"] if method.name == "zero-shot" else known)["accuracy"]
        else:
            accuracy[task.name] = bench.asked(model, bench.collator, task)["accuracy"]
        if model is not before:
            for skill, value in _skills(bench, model).items():
                skills.setdefault(skill, []).append(value)
    return {"accuracy": accuracy, "skills": {skill: sum(found) / len(found) for skill, found in skills.items()}}


def _skills(bench: Bench, model: Any) -> dict[str, float]:
    """The perplexity of prose; and of a base model that was aligned here, how well it still describes pictures."""
    collator = bench.collator
    with autocast(model.device):
        found = {"perplexity": perplexity_of(model, collator.processor.tokenizer, prose())}
    if bench.captions is not None:
        (task,) = find_tasks(bench.captions)
        examples = task.examples("test", bench.settings.tests)
        said = answers(model, collator, examples, bench.settings.training.at_once, label="describing pictures")
        found["captions"] = overlap(said, [example.answer for example in examples])
    return found
