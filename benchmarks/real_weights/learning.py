"""Training with transformers' `Trainer`, which goes on where it was interrupted, and answering by greedy decoding."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import get_last_checkpoint

from peft_many.algebra.devices import has_half_precision
from peft_many.data.batches import IGNORED, ChatCollator, Rows, batches
from peft_many.data.conversations import Example

_WORKERS = 2  # processes that open pictures while a GPU computes
_COMPILED_FROM = 50  # steps, on a CPU: fewer hardly save what compiling takes


@dataclass(frozen=True)
class Schedule:
    """How long and how fast something is trained.

    Args:
        steps (`int`): Optimizer steps.
        batch_size (`int`): Examples to a step.
        learning_rate (`float`): At its highest; a short warm-up, then a cosine to zero.
        at_once (`int`): Examples in one pass; a batch is made of several passes if it is larger.
        save_steps (`int`): Steps after which the state is saved, to go on from.
    """

    steps: int
    batch_size: int
    learning_rate: float
    at_once: int = 32
    save_steps: int = 50

    def times(self, count: int) -> Schedule:
        """So many times as long."""
        return replace(self, steps=self.steps * count)

    @property
    def passes(self) -> int:
        """Passes that make a step."""
        return -(-self.batch_size // self.at_once)


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """To bfloat16, where that is not slower than float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_half_precision(device))


class AnswerTrainer(Trainer):
    """A `Trainer` that computes logits only where answers are, and leaves frozen batch norms as they are."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean cross-entropy of the answers' tokens; the other tokens' logits would be a fifth of the work."""
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # in training mode its means would drift, frozen or not
                module.eval()
        inputs = dict(inputs)
        labels: Tensor = inputs.pop("labels")
        options = {}
        columns = torch.arange(labels.shape[1] - 1, device=labels.device)
        if _keeps_logits(model):
            columns = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
            options["logits_to_keep"] = columns
        outputs = model(**inputs, **options, use_cache=False)
        logits = outputs.logits if options else outputs.logits[:, :-1]
        targets = labels[:, columns + 1].to(logits.device)
        total = functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        return (loss, outputs) if return_outputs else loss


def learn(
    model: nn.Module,
    collator: ChatCollator,
    examples: Sequence[Example],
    schedule: Schedule,
    folder: Path,
    seed: int,
    label: str,
) -> list[dict[str, float]]:
    """Train what requires a gradient.

    Args:
        model (`nn.Module`): Is changed; its frozen weights may be in bfloat16. `Trainer` goes on with a model that has
            an adapter, or that is saved under its own names of weights, as FastVLM is, but LLaVA is not.
        collator ([`ChatCollator`]): Makes the batches.
        examples (`Sequence[Example]`): Shuffled anew in each round.
        schedule ([`Schedule`]): How long and how fast.
        folder (`Path`): Where to keep the state, to go on from if it is interrupted; removed at the end.
        seed (`int`): Of the order.
        label (`str`): For people who wait.

    Returns:
        `list`: Losses on the way.
    """
    on_gpu = torch.accelerator.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=min(schedule.at_once, schedule.batch_size),
        gradient_accumulation_steps=schedule.passes,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, schedule.steps // 20),
        weight_decay=0.0,
        bf16=has_half_precision(next(model.parameters()).device),
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        dataloader_num_workers=_WORKERS if on_gpu else 0,  # a CPU has better things to do
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=10,
        logging_first_step=True,
        save_steps=schedule.save_steps,
        save_total_limit=1,
        report_to=[],
        seed=seed,
    )
    if not on_gpu and schedule.steps >= _COMPILED_FROM and shutil.which(os.environ.get("CXX", "g++")):
        compile_layers(model)
    trainer = AnswerTrainer(model, arguments, train_dataset=Rows(examples), data_collator=collator.training)
    print(f"{label}: {schedule.steps} steps of {schedule.batch_size}, {len(examples)} examples", flush=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    losses = [{"step": log["step"], "loss": log["loss"]} for log in trainer.state.log_history if "loss" in log]
    shutil.rmtree(folder, ignore_errors=True)
    model.eval()
    return losses


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile layers one by one: as they are alike that takes half a minute, and a CPU trains 1.7 times as fast."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(backend=backend, dynamic=True)


@torch.inference_mode()
def answers(
    model: Any,
    collator: ChatCollator,
    examples: Sequence[Example],
    batch_size: int,
    longest: int = 24,
    label: str = "",
) -> list[str]:
    """What the model says, greedily."""
    model.eval()
    device = next(model.parameters()).device
    texts: list[str] = []
    asked = batches(examples, collator.questions, batch_size)
    for batch in tqdm(asked, total=-(-len(examples) // batch_size), desc=label, leave=False, mininterval=1):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with autocast(device):
            tokens = model.generate(**batch, max_new_tokens=longest, do_sample=False)
        said = tokens[:, batch["input_ids"].shape[1] :]
        texts += collator.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _keeps_logits(model: nn.Module) -> bool:
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
