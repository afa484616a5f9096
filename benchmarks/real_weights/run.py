"""From nothing, or from a model and tasks that somebody has, to one adapter for each task; what is made is kept."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from peft_many import MAnyConfig, collect_statistics
from peft_many.algebra.devices import has_half_precision, multiply_rows_at_once
from peft_many.data.batches import ChatCollator, batches
from peft_many.files.atomic import new_folder

from .alignment import align
from .checkpoint import build_checkpoint
from .fetching import default_cache, fetch
from .learning import Schedule, answers, autocast, learn
from .messages import TaskFiles, find_tasks
from .packages import PICTURES, WEIGHTS, Package
from .pictures import paint_tasks
from .records import Records
from .scores import score
from .tasks import CAPTIONS, SHARING, TASKS, Task

RESULTS_NAME = "results.json"
PREPARED_NAME = "prepared.json"
ALIGNMENT = Schedule(steps=400, batch_size=32, learning_rate=1e-3)
TRAINING = Schedule(steps=400, batch_size=16, learning_rate=5e-4)
_KEPT_PROMPTS = 16  # of each task, for refits without data

# Libraries that the stages of preparing take: building and aligning the model, or else painting.
_NEEDED = {"checkpoint": ("gguf", "timm"), "alignment": ("timm",)}
_PAINTING = ("resvg_py", "matplotlib", "skimage", "sklearn")


@dataclass(frozen=True)
class Settings:
    """What is built, trained and asked.

    Args:
        output (`Path`): Where everything is kept.
        model (`str`, *optional*): A vision-language model, by Hub id or folder; built if not given.
        data (`Path`, *optional*): A folder of tasks; painted if not given.
        tasks (`Sequence[str]`, *optional*): Which of them, in this order; all if not given, or of those that are
            painted the six that share no pictures.
        cache (`Path`): For packages.
        seed (`int`): Of adapters and their training. Pictures and base model are the same for all seeds.
        alignment ([`Schedule`]): Of the projector of the model that is built.
        training ([`Schedule`]): Of each task's adapter.
        rank (`int`): LoRA's.
        pictures, captions (`int`): Painted to train on, for each kind of pictures and to align with.
        tests (`int`): Questions asked of each task.
        measured (`int`): Examples to measure statistics on.
    """

    output: Path
    model: str | None = None
    data: Path | None = None
    tasks: Sequence[str] | None = None
    cache: Path = field(default_factory=default_cache)
    seed: int = 0
    alignment: Schedule = ALIGNMENT
    training: Schedule = TRAINING
    rank: int = 16
    pictures: int = 4_000
    captions: int = 12_000
    tests: int = 300
    measured: int = 256


class Bench:
    """One run: its stages in their order, each made once.

    What is the same for all seeds is recorded in `prepared.json`, the rest in the seed's `results.json`.

    Args:
        settings ([`Settings`]): What is asked for.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.output / f"seed{settings.seed}"
        self.prepared = Records(settings.output / PREPARED_NAME)
        self.records = Records(self.folder / RESULTS_NAME)
        self.data = settings.data or settings.output / "data"
        self._captions = settings.output / "captions"
        torch.manual_seed(settings.seed)

    # --- The stages --------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Fetch, build, paint and align, as far as nothing else is given.

        Raises:
            ModuleNotFoundError: It takes a library that is not installed.
        """
        wants = self.settings
        stages: dict[str, Callable[[], Any]] = {}
        if wants.model is None:
            stages["captions"] = lambda: self._paint(self._captions, [CAPTIONS], wants.captions)
            stages |= {"checkpoint": self._build, "alignment": self._align}
        if wants.data is None:
            stages["pictures"] = lambda: self._paint(self.data, [*TASKS, *SHARING], wants.pictures)
        missing = [stage for stage in stages if stage not in self.prepared]
        if missing:
            _need(name for stage in missing for name in _NEEDED.get(stage, _PAINTING))
            self.prepared.record("packages", self._licences)
            fetch(self._packages(), wants.cache)
        for stage, make in stages.items():
            self.prepared.record(stage, make)

    def train(self) -> None:
        """Train, measure and save the adapter of each task, and ask it."""
        for task in self.tasks():
            self.records.record(f"alone/{task.name}", lambda task=task: self._train(task))

    def tasks(self) -> list[TaskFiles]:
        """The tasks in their order."""
        painted = [task.name for task in TASKS] if self.settings.data is None else None
        return find_tasks(self.data, self.settings.tasks or painted)

    def base(self) -> tuple[PreTrainedModel, ChatCollator]:
        """A fresh base model, and what makes its batches."""
        return load(self.settings.model or str(self.settings.output / "base"))

    @cached_property
    def collator(self) -> ChatCollator:
        """What makes batches for any of its models."""
        return self.base()[1]

    @property
    def named(self) -> str:
        """The tasks, as stages are called that are about all of them."""
        return "+".join(task.name for task in self.tasks())

    @property
    def captions(self) -> Path | None:
        """The captions that the base model was aligned with, if it was aligned here."""
        return self._captions if self.settings.model is None else None

    def adapter(self, task: TaskFiles) -> Path:
        """Where the task's own adapter is."""
        return self.folder / "alone" / task.name

    # --- How ---------------------------------------------------------------------------------------------------------

    def _packages(self) -> list[Package]:
        """What is built and painted with."""
        wants = self.settings
        return [*(WEIGHTS if wants.model is None else ()), *(() if wants.model and wants.data else PICTURES)]

    def _licences(self) -> dict[str, str]:
        return {f"{package.name} {package.version}": package.licence for package in self._packages()}

    def _paint(self, data: Path, tasks: Sequence[Task], count: int) -> dict[str, str]:
        paint_tasks(data, tasks, self.settings.cache, {"train": count, "test": self.settings.tests})
        return {task.name: task.about for task in tasks}

    def _build(self) -> dict[str, Any]:
        folder = self.settings.output / "parts"
        if not folder.exists():
            build_checkpoint(folder, self.settings.cache)
        model, _ = load(str(folder))
        return {"parameters": sum(parameter.numel() for parameter in model.parameters())}

    def _align(self) -> dict[str, Any]:
        """The projector alone learns to make captions of pictures; the same for all seeds."""
        output, schedule = self.settings.output, self.settings.alignment
        (task,) = find_tasks(self._captions)
        found: dict[str, Any] = {"schedule": asdict(schedule)}
        if not (output / "base").exists():
            model, collator = load(str(output / "parts"))
            found["losses"] = align(model, collator, task.examples("train"), schedule, output / "aligning")
            with new_folder(output / "base") as partial:
                model.to(torch.bfloat16).save_pretrained(partial)
                collator.processor.save_pretrained(partial)
        model, collator = self.base()
        return {**found, **self.asked(model, collator, task)}

    def _train(self, task: TaskFiles) -> dict[str, Any]:
        wants, folder = self.settings, self.adapter(task)
        model, collator = self.base()
        found: dict[str, Any] = {"schedule": asdict(wants.training), "zero_shot": self.asked(model, collator, task)}
        if not folder.exists():
            torch.manual_seed(wants.seed)
            config = MAnyConfig(r=wants.rank, lora_alpha=2 * wants.rank, task_name=task.name)
            adapted: Any = get_peft_model(model, config)
            state = self.folder / "training" / task.name
            examples = task.examples("train")
            found["losses"] = learn(adapted, collator, examples, wants.training, state, wants.seed, task.name)
            with autocast(adapted.device):
                measured = batches(examples[: wants.measured], collator.training, wants.training.at_once)
                collect_statistics(
                    adapted, measured, max_samples=wants.measured, keep_prompts=_KEPT_PROMPTS, progress=False
                )
            with new_folder(folder) as partial:
                adapted.save_pretrained(partial)
            model, collator = self.base()
        adapted = PeftModel.from_pretrained(model, str(folder))
        return {**found, **self.asked(adapted, collator, task)}

    def asked(self, model: Any, collator: ChatCollator, task: TaskFiles) -> dict[str, Any]:
        """What a model answers to the task's test questions, in their order, and how good that is."""
        examples = task.examples("test", self.settings.tests)
        given = answers(model, collator, examples, self.settings.training.at_once, label=f"asking {task.name}")
        return {"score": score(given, [example.answer for example in examples]), "answers": given}


def load(name: str) -> tuple[PreTrainedModel, ChatCollator]:
    """A vision-language model in the dtype it computes in, on the GPU if there is one, and what makes its batches."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if has_half_precision(device) else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).eval().to(device)
    if device.type == "cpu":  # a quarter faster to train: its fused attention is slow at some dozens of tokens
        model.set_attn_implementation("eager")
        model.to(memory_format=torch.channels_last)
        multiply_rows_at_once(model.get_output_embeddings())
    return model, ChatCollator(AutoProcessor.from_pretrained(name), pad_images=True)


def _need(libraries: Iterable[str]) -> None:
    missing = [name for name in dict.fromkeys(libraries) if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"Building needs {', '.join(missing)}: pip install -e '.[real]'")
