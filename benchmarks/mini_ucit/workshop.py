"""Trains and measures the adapters that the methods share, each once: a run that was interrupted goes on with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_many import MAnyConfig, collect_statistics, merge_adapter_sequence
from peft_many.files.atomic import new_folder
from peft_many.files.statistics import AdapterStatistics
from peft_many.tuner.layers import lora_layers

from .base_skills import BaseSkills, base_skills
from .model import Collator, TinyModel
from .parts import Pairs, added, pairs_of, with_parts
from .training import accuracy, batches_of, shuffled_batches, train
from .world import Example, Task

BATCH_SIZE = 32
LEARNING_RATE = 4e-3
RANK = 8
MEASURED = 128  # samples for covariances and prototypes
# O-LoRA's strength. Of 0.5, the paper's, 0.1, 0.02 and 0.004, seed 0 of `llava` keeps 9.0, 15.4, 13.5 and 15.6 points.
ORTHOGONALITY = 0.1
DRAWN = 80 * BATCH_SIZE  # training examples of a task, at the most


@dataclass(frozen=True, eq=False)
class Workshop:
    """One model, one seed, the tasks in their order: where every adapter of a benchmark run is made and kept.

    Every method has the same budget: `steps` batches for each task, the same learning rate, the same rank.

    Args:
        tiny ([`TinyModel`]): The model.
        weights (`Path`, *optional*): Its pre-trained weights; those of the package if not given.
        tasks (`Sequence[Task]`): In the order in which they come.
        folder (`Path`): Where adapters are kept.
        seed (`int`): Draws the pictures and the adapters' initial weights.
        steps (`int`): Training steps for each task.
        tests (`int`): Test pictures for each task.
    """

    tiny: TinyModel
    weights: Path | None
    tasks: Sequence[Task]
    folder: Path
    seed: int
    steps: int
    tests: int
    _questions: dict[str, list[Example]] = field(default_factory=dict, repr=False)

    # --- The model and the questions ---------------------------------------------------------------------------------

    def base(self) -> PreTrainedModel:
        """A fresh base model."""
        model = self.tiny.load(self.weights)
        model.name_or_path = f"mini-ucit/{self.tiny.name}"  # adapters name it; its folder may be another one tomorrow
        return model

    def questions(self, task: Task) -> list[Example]:
        """The task's test pictures."""
        if task.name not in self._questions:
            self._questions[task.name] = task.examples(self.tests, "test", self.seed + 1)
        return self._questions[task.name]

    def accuracy(self, model: nn.Module, task: Task) -> float:
        """Exact-match accuracy in per cent on the task's test pictures."""
        return accuracy(model, Collator(self.tiny, prompts_only=True), self.questions(task))

    def base_skills(self, models: Sequence[nn.Module]) -> BaseSkills:
        """What a model still can of what the base model could; of several, on average."""
        return base_skills(self.tiny, models, self.seed, self.tests)

    # --- Training ----------------------------------------------------------------------------------------------------

    def alone(self, task: Task) -> Path:
        """The task's own adapter with its statistics, trained from the base model."""

        def make(folder: Path) -> None:
            model = self._wrapped(self.base(), task.name)
            self._learn(model, [task], self.steps, f"learning {task.name}")
            collect_statistics(model, self.measured(task), max_samples=MEASURED, progress=False)
            model.save_pretrained(folder)

        return self.made(f"alone/{task.name}", make)

    def sequential(self, stage: int) -> Path:
        """One adapter, trained on the first `stage` tasks one after the other."""

        def make(folder: Path) -> None:
            if stage == 1:
                model = self._wrapped(self.base())
            else:
                model = PeftModel.from_pretrained(self.base(), self.sequential(stage - 1), is_trainable=True)
            self._learn(model, [self.tasks[stage - 1]], self.steps, f"then learning {self.tasks[stage - 1].name}")
            model.save_pretrained(folder)

        return self.made(f"sequential/{stage}", make)

    def joint(self) -> Path:
        """One adapter, trained on all tasks at once, for as long as all of them alone."""

        def make(folder: Path) -> None:
            model = self._wrapped(self.base())
            self._learn(model, self.tasks, self.steps * len(self.tasks), "learning all at once")
            model.save_pretrained(folder)

        return self.made(f"joint/{len(self.tasks)}", make)

    def orthogonal(self, stage: int) -> Path:
        """O-LoRA (arXiv 2310.14152): a LoRA for each task, whose `A` is kept orthogonal to the earlier ones.

        The earlier LoRAs are frozen and stay active; the projector goes on from where it was.
        """

        def make(folder: Path) -> None:
            before: list[Pairs] = []
            start: Any = self.base()
            if stage > 1:
                before = [pairs_of(self.orthogonal(stage - 1))]
                start = PeftModel.from_pretrained(start, self.orthogonal(stage - 1)).merge_and_unload()
            model = self._wrapped(start)

            def overlap() -> torch.Tensor:
                """`Σ |A_s A_tᵀ|` over the layers, the paper's equation 7."""
                layers: dict[str, Any] = dict(lora_layers(model.get_base_model(), "default"))
                parts = [before[0][name][0] @ layer.lora_A["default"].weight.T for name, layer in layers.items()]
                return ORTHOGONALITY * torch.stack([part.abs().sum() for part in parts]).sum()

            label = f"learning {self.tasks[stage - 1].name} apart"
            self._learn(model, [self.tasks[stage - 1]], self.steps, label, penalty=overlap if before else None)
            model.save_pretrained(folder / "own")
            whole = added([*before, pairs_of(folder / "own")])
            with_parts(self.base, lora=whole, projectors=folder / "own").save_pretrained(folder)
            shutil.rmtree(folder / "own")

        return self.made(f"orthogonal/{stage}", make)

    def after_merging(self, task: Task, stage: int) -> Path:
        """The task's adapter, trained from the merge of the tasks before it in place of the base model."""
        if stage == 1:
            return self.alone(task)

        def make(folder: Path) -> None:
            before = [self.after_merging(earlier, s) for s, earlier in enumerate(self.tasks[: stage - 1], start=1)]
            merge_adapter_sequence(self.base(), before, progress=False).save_pretrained(folder / "merge")
            start = with_parts(self.base, lora=folder / "merge", projectors=None).merge_and_unload()
            model = self._wrapped(start, task.name)
            self._learn(model, [task], self.steps, f"learning {task.name} from the merge")
            model.save_pretrained(folder / "own")
            whole = added([pairs_of(folder / "merge"), pairs_of(folder / "own")])
            model = with_parts(self.base, lora=whole, projectors=folder / "own")
            model.peft_config["default"].task_name = task.name
            collect_statistics(model, self.measured(task), max_samples=MEASURED, progress=False)
            model.save_pretrained(folder)
            shutil.rmtree(folder / "merge")
            shutil.rmtree(folder / "own")

        return self.made(f"after_merging/{task.name}", make)

    # --- Measuring ---------------------------------------------------------------------------------------------------

    def samples(self, task: Task, count: int = MEASURED) -> list[Example]:
        """Pictures to measure on: training pictures, other ones than those trained on."""
        return task.examples(count, "train", self.seed + 2)

    def measured(self, task: Task, samples: int = MEASURED) -> list[dict[str, torch.Tensor]]:
        """Batches to collect statistics from."""
        return batches_of(self.samples(task, samples), Collator(self.tiny), BATCH_SIZE)

    def remeasured(self, task: Task, key: str, samples: int = MEASURED, **options: Any) -> Path:
        """The task's own adapter with statistics collected otherwise: `samples`, and `collect_statistics`' options."""

        def make(folder: Path) -> None:
            model = PeftModel.from_pretrained(self.base(), self.alone(task))
            collect_statistics(model, self.measured(task, samples), max_samples=samples, progress=False, **options)
            model.save_pretrained(folder)

        return self.made(f"remeasured/{key}/{task.name}", make)

    def measured_on_base(self, task: Task) -> Path:
        """The task's own adapter with statistics of the base model on the task's data."""

        def make(folder: Path) -> None:
            model = PeftModel.from_pretrained(self.base(), self.alone(task))
            silent = self._wrapped(self.base(), task.name)  # a new LoRA does nothing
            found = collect_statistics(silent, self.measured(task), max_samples=MEASURED, progress=False)
            # They were measured with other weights, which is what this is about; nothing must warn of that.
            unsigned = replace(found.tasks[0], fingerprints={})
            model.peft_config["default"].statistics = AdapterStatistics((unsigned,))
            model.save_pretrained(folder)

        return self.made(f"measured_on_base/{task.name}", make)

    # --- How ---------------------------------------------------------------------------------------------------------

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder of this name, made by `make` if it is not there yet; whole or not at all."""
        folder = self.folder / name
        if not folder.exists():
            with new_folder(folder) as partial:
                make(partial)
        return folder

    def _wrapped(self, model: nn.Module, task_name: str | None = None) -> PeftModel:
        torch.manual_seed(self.seed)
        return get_peft_model(model, MAnyConfig(r=RANK, lora_alpha=2 * RANK, task_name=task_name))

    def _learn(
        self,
        model: nn.Module,
        tasks: Sequence[Task],
        steps: int,
        label: str,
        penalty: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        drawn = min(DRAWN, steps * BATCH_SIZE)
        examples = [example for task in tasks for example in task.examples(drawn, "train", self.seed)]
        batches = shuffled_batches(examples, Collator(self.tiny), BATCH_SIZE, self.seed)
        torch.manual_seed(self.seed)
        train(model, batches, steps, LEARNING_RATE, penalty=penalty, label=label)
