"""What the benchmark compares: every method behind one interface, with the source it follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from torch import nn

from peft_many import merge_adapter_sequence, refit_merge
from peft_many.methods import METHODS as MERGE_METHODS

from .base_skills import BaseSkills
from .parts import with_parts
from .workshop import Workshop
from .world import Task

# The model that answers for a task.
Answerer = Callable[[Task], nn.Module]


@dataclass(frozen=True)
class Measured:
    """What a measurement gave.

    Args:
        scores (`list[list[float]]`):
            A row for each stage on the tasks so far, or one row after the last stage; in per cent.
        base ([`BaseSkills`], *optional*): What is left of the base model's skills after the last stage.
    """

    scores: list[list[float]]
    base: BaseSkills | None = None


@dataclass(frozen=True)
class Measurement(ABC):
    """One row of the tables: a number in per cent for each task.

    Args:
        name (`str`): What it is called.
        group (`str`): The table it belongs to.
        about (`str`): What it does, in one line, and the source it follows.
    """

    name: str
    group: str
    about: str

    @abstractmethod
    def measure(self, shop: Workshop) -> Measured:
        """Make what is to be measured, and measure it."""


@dataclass(frozen=True)
class Method(Measurement):
    """A measurement of accuracy.

    Args:
        after (`Callable[[Workshop, int], Answerer]`):
            The model, or one for each task, after the first so many tasks.
        every_stage (`bool`): Whether it is asked after each task, for the accuracy matrix, or after the last only.
        quick (`bool`): Whether it is in the quick mode too.
    """

    after: Callable[[Workshop, int], Answerer]
    every_stage: bool = False
    quick: bool = False

    def measure(self, shop: Workshop) -> Measured:
        last = len(shop.tasks)
        rows: list[list[float]] = []
        models: dict[int, nn.Module] = {}
        for stage in range(1, last + 1) if self.every_stage else [last]:
            answerer = self.after(shop, stage)
            of_tasks = [answerer(task) for task in shop.tasks[:stage]]
            rows.append([shop.accuracy(model, task) for model, task in zip(of_tasks, shop.tasks)])
            models = {id(model): model for model in of_tasks}
        return Measured(rows, shop.base_skills([*models.values()]))


def same(model: nn.Module) -> Answerer:
    """One model for all tasks."""
    return lambda task: model


# --- Training, and its bounds ----------------------------------------------------------------------------------------


def _zero_shot(shop: Workshop, stage: int) -> Answerer:
    return same(shop.base())


def _trained(shop: Workshop, folder: Path) -> Answerer:
    return same(PeftModel.from_pretrained(shop.base(), folder))


def _sequential(shop: Workshop, stage: int) -> Answerer:
    return _trained(shop, shop.sequential(stage))


def _orthogonal(shop: Workshop, stage: int) -> Answerer:
    return _trained(shop, shop.orthogonal(stage))


def _joint(shop: Workshop, stage: int) -> Answerer:
    return _trained(shop, shop.joint())


def _alone(shop: Workshop, stage: int) -> Answerer:
    return lambda task: PeftModel.from_pretrained(shop.base(), shop.alone(task))


# --- Merging ---------------------------------------------------------------------------------------------------------


def merged(shop: Workshop, stage: int, adapter: Callable[[Task], Path] | None = None, **options: Any) -> PeftModel:
    """The merge of the first `stage` tasks' adapters, with the options of `merge_adapter_sequence`."""
    adapters = [(adapter or shop.alone)(task) for task in shop.tasks[:stage]]
    return merge_adapter_sequence(shop.base(), adapters, progress=False, **options)


def _merge(shop: Workshop, stage: int, **options: Any) -> Answerer:
    return same(merged(shop, stage, **options))


def refitted(
    shop: Workshop, stage: int, targets: Literal["outputs", "deltas"], router: str = "cosine", **options: Any
) -> Answerer:
    """MAny with its LoRA refitted on the samples that statistics are collected from."""
    model = merged(shop, stage, router=router)
    samples = {task.name: shop.measured(task) for task in shop.tasks[:stage]}
    refit_merge(model, samples, targets=targets, progress=False, **options)
    return same(model)


_QUICK = ("average", "ties", "regmean")


def _baselines() -> Iterator[Method]:
    """The published methods, with averaged projectors as they come, and with CPM."""
    for name, kind in MERGE_METHODS.items():
        about = kind.source
        plain = partial(_merge, method=name, projectors="mean")
        yield Method(name, MAIN, about, plain, every_stage=True, quick=name in _QUICK)
        yield Method(f"{name}, CPM", WITH_CPM, about, partial(_merge, method=name))


def merge_folder(shop: Workshop, stage: int, **options: Any) -> Path:
    """The merge of the first `stage` tasks' adapters, saved."""
    key = "_".join(f"{name}={value}" for name, value in options.items()) or "default"
    return shop.made(f"merged/{key}/{stage}", lambda folder: merged(shop, stage, **options).save_pretrained(folder))


# --- Halves: whose LoRA, whose projector -----------------------------------------------------------------------------


def _own_lora_routed(shop: Workshop, stage: int, **options: Any) -> Answerer:
    folder = merge_folder(shop, stage, **options)
    return lambda task: with_parts(shop.base, lora=shop.alone(task), projectors=folder)


def lpm_own_projector(shop: Workshop, stage: int, **options: Any) -> Answerer:
    """The merged LoRA, and the projector of the task that is asked."""
    return lambda task: with_parts(shop.base, lora=merge_folder(shop, stage, **options), projectors=shop.alone(task))


def _reasoning_collapse(shop: Workshop, stage: int) -> Answerer:
    return lambda task: with_parts(shop.base, lora=shop.sequential(stage), projectors=shop.alone(task))


def _perception_drift(shop: Workshop, stage: int) -> Answerer:
    return lambda task: with_parts(shop.base, lora=shop.alone(task), projectors=shop.sequential(stage))


# --- The tables ------------------------------------------------------------------------------------------------------

MAIN, WITH_CPM, HALVES, BEYOND = "methods", "with CPM", "halves", "beyond the paper"

_LISTED = (
    Method("zero-shot", MAIN, "The base model.", _zero_shot, quick=True),
    Method(
        "sequential",
        MAIN,
        "One LoRA and projector, trained on task after task.",
        _sequential,
        every_stage=True,
        quick=True,
    ),
    Method(
        "O-LoRA",
        MAIN,
        "A LoRA for each task, orthogonal to the earlier ones (arXiv 2310.14152).",
        _orthogonal,
        every_stage=True,
    ),
    Method("joint", MAIN, "One LoRA and projector, trained on all tasks at once.", _joint),
    Method("alone", MAIN, "Each task's own adapter, told which task it is: an oracle.", _alone, quick=True),
    *_baselines(),
    Method("MAny", MAIN, "LPM and CPM (arXiv 2604.14016).", _merge, every_stage=True, quick=True),
    Method(
        "MAny, refitted to deltas",
        BEYOND,
        "Statistics measured anew in the merge, layer by layer (RegMean++, arXiv 2508.03121).",
        partial(refitted, targets="deltas"),
    ),
    Method(
        "MAny, refitted to outputs",
        BEYOND,
        "Each layer fitted to the task models' outputs on the merge's inputs.",
        partial(refitted, targets="outputs"),
    ),
    Method(
        "MAny, Gaussian router",
        BEYOND,
        "Images compared in the metric of how a task's images differ among themselves.",
        partial(_merge, router="gaussian"),
        every_stage=True,
        quick=True,
    ),
    Method(
        "MAny, gated LoRA",
        BEYOND,
        "The routing weights choose among the tasks' own LoRAs too.",
        partial(_merge, gate_lora=True),
        every_stage=True,
    ),
    Method(
        "gated LoRA, Gaussian router",
        BEYOND,
        "Both.",
        partial(_merge, gate_lora=True, router="gaussian"),
        every_stage=True,
        quick=True,
    ),
    Method(
        "refitted to deltas, Gaussian router",
        BEYOND,
        "Both.",
        partial(refitted, targets="deltas", router="gaussian"),
    ),
    Method(
        "refitted to outputs, Gaussian router",
        BEYOND,
        "Both.",
        partial(refitted, targets="outputs", router="gaussian"),
        every_stage=True,
    ),
    Method("LPM, own projector", HALVES, "LPM, and the projector of the task that is asked.", lpm_own_projector),
    Method("own LoRA, CPM", HALVES, "The LoRA of the task that is asked, and CPM.", _own_lora_routed),
    Method(
        "own LoRA, CPM by Gaussian router",
        HALVES,
        "The LoRA of the task that is asked, and CPM by the Gaussian router.",
        partial(_own_lora_routed, router="gaussian"),
    ),
    Method(
        "reasoning collapse", HALVES, "Sequential LoRA, each task's own projector.", _reasoning_collapse, quick=True
    ),
    Method("perception drift", HALVES, "Each task's own LoRA, sequential projector.", _perception_drift, quick=True),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _LISTED}
