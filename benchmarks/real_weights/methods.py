"""What is compared: the base model, ways of training on all tasks, and merges of the tasks' adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model

from peft_many import MAnyConfig, merge_adapter_sequence, refit_merge
from peft_many.data.batches import batches
from peft_many.files.atomic import new_folder

from .learning import Schedule, autocast, learn
from .messages import TaskFiles

if TYPE_CHECKING:
    from .run import Bench

_REFITTED = 64  # samples of each task to refit on
# The model that answers for a task.
Answerer = Callable[[TaskFiles], Any]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        name (`str`): What it is called.
        about (`str`): What it does, in one line.
        make (`Callable[[Bench], Answerer]`): Makes the model, or one for each task.
        is_known (`bool`): Whether what it answers was asked when the adapters were trained.
        trains (`bool`): Whether it is trained on the tasks itself, and needs no adapters of theirs.
    """

    name: str
    about: str
    make: Callable[[Bench], Answerer]
    is_known: bool = False
    trains: bool = False


def _base(bench: Bench) -> Answerer:
    return _same(bench.base()[0])


def _alone(bench: Bench) -> Answerer:
    return lambda task: PeftModel.from_pretrained(bench.base()[0], str(bench.adapter(task)))


def _merged(bench: Bench, **options: Any) -> PeftModel:
    folders = [bench.adapter(task) for task in bench.tasks()]
    return merge_adapter_sequence(bench.base()[0], folders, progress=False, **options)


def _merge(bench: Bench, **options: Any) -> Answerer:
    return _same(_merged(bench, **options))


def _refit(bench: Bench, **options: Any) -> Answerer:
    model, (_, collator), wants = _merged(bench, **options), bench.base(), bench.settings
    samples = {
        task.name: [*batches(task.examples("train", _REFITTED), collator.training, wants.training.at_once)]
        for task in bench.tasks()
    }
    with autocast(model.device):
        refit_merge(model, samples, progress=False)
    return _same(model)


def _refit_without_data(bench: Bench, **options: Any) -> Answerer:
    model = _merged(bench, **options)
    with autocast(model.device):
        refit_merge(model, max_samples=_REFITTED, progress=False)
    return _same(model)


def _sequential(bench: Bench) -> Answerer:
    folder, before = bench.folder / "sequential", None
    for task in bench.tasks():
        folder = folder / task.name
        before = _trained(bench, folder, [task], bench.settings.training, before)
    return _same(PeftModel.from_pretrained(bench.base()[0], str(before)))


def _joint(bench: Bench) -> Answerer:
    """For as long as all of the tasks alone."""
    tasks = bench.tasks()
    adapter = _trained(bench, bench.folder / "joint" / bench.named, tasks, bench.settings.training.times(len(tasks)))
    return _same(PeftModel.from_pretrained(bench.base()[0], str(adapter)))


def _trained(
    bench: Bench, folder: Path, tasks: Sequence[TaskFiles], schedule: Schedule, start: Path | None = None
) -> Path:
    """An adapter that learnt tasks at once, going on from another one if so; made if it is not there yet."""
    adapter, wants = folder / "adapter", bench.settings
    if not adapter.exists():
        model, collator = bench.base()
        if start is None:
            torch.manual_seed(wants.seed)
            model = get_peft_model(model, MAnyConfig(r=wants.rank, lora_alpha=2 * wants.rank))
        else:
            model = PeftModel.from_pretrained(model, str(start), is_trainable=True)
        examples = [example for task in tasks for example in task.examples("train")]
        label = ", ".join(task.name for task in tasks)
        learn(model, collator, examples, schedule, folder / "training", wants.seed, label)
        with new_folder(adapter) as made:
            model.save_pretrained(made)
    return adapter


def _same(model: Any) -> Answerer:
    """One model for all tasks."""
    return lambda task: model


_GATED = {"gate_lora": True, "router": "gaussian"}
_BY_BOTH = {**_GATED, "gate_by": "both", "route_by": "both"}
_LISTED = (
    Method("zero-shot", "The base model.", _base, is_known=True),
    Method("alone", "Each task's own adapter, told which task it is: an oracle.", _alone, is_known=True),
    Method("average", "Averaged LoRAs and projectors.", partial(_merge, method="average", projectors="mean")),
    Method("average, CPM", "Averaged LoRAs, routed projectors.", partial(_merge, method="average")),
    Method(
        "task arithmetic", "Added LoRAs (2212.04089).", partial(_merge, method="task_arithmetic", projectors="mean")
    ),
    Method("TIES", "2306.01708.", partial(_merge, method="ties", projectors="mean")),
    Method("RegMean", "2212.09849.", partial(_merge, method="regmean", projectors="mean")),
    Method("Core Space", "2509.17786.", partial(_merge, method="core_space", projectors="mean")),
    Method("MAny", "LPM and CPM (2604.14016).", _merge),
    Method("MAny, Gaussian router", "Images compared in the tasks' own metrics.", partial(_merge, router="gaussian")),
    Method("MAny, refitted", "The same, its LoRA fitted on samples.", partial(_refit, router="gaussian")),
    Method("MAny, refitted without data", "... on imagined samples.", partial(_refit_without_data, router="gaussian")),
    Method("gated by images", "Each row gets the LoRA of the task that its image is like.", partial(_merge, **_GATED)),
    Method("gated by instructions", "... its instruction.", partial(_merge, **_GATED, gate_by="instructions")),
    Method("gated by both", "... both.", partial(_merge, **_GATED, gate_by="both")),
    Method(
        "gated and routed by both",
        "... and each image gets that task's projector.",
        partial(_merge, **_BY_BOTH),
    ),
    Method("sequential", "One LoRA and projector, trained on task after task.", _sequential, trains=True),
    Method("joint", "One LoRA and projector, trained on all tasks at once.", _joint, trains=True),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _LISTED}
# One option at a time, away from the defaults: how much these matter.
_CHANGED: Sequence[tuple[str, dict[str, Any]]] = (
    *((f"MAny, ridge={ridge:g}", {"ridge": ridge}) for ridge in (1e-6, 1e-3, 1e-2, 1e-1)),
    *((f"MAny, rank={rank}", {"rank": rank}) for rank in (16, 32, 64)),
    *((f"MAny, temperature={value:g}", {"temperature": value}) for value in (0.005, 0.05, 0.2)),
    *(
        (f"MAny, Gaussian router, temperature={value:g}", {"router": "gaussian", "temperature": value})
        for value in (0.25, 4, 16)
    ),
    *((f"MAny, top_k={count}", {"top_k": count}) for count in (1, 2)),
    ("gated by both, abstain_above=3", {**_GATED, "gate_by": "both", "abstain_above": 3}),
    *((f"gated and routed by both, abstain_above={value}", {**_BY_BOTH, "abstain_above": value}) for value in (2, 3)),
)
VARIANTS: Mapping[str, Method] = {
    name: Method(name, "An option changed.", partial(_merge, **options)) for name, options in _CHANGED
}
