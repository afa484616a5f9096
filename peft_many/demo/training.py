"""A plain training loop and exact-match evaluation: nothing in here knows about peft_many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from .model import Collator
from .tasks import Example


def train(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    label: str = "training",
) -> list[float]:
    """Trains whatever requires a gradient with AdamW, a short warm-up and a cosine to zero; returns the losses."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=min(0.1, 500 / steps), cycle_momentum=False
    )
    losses: list[float] = []
    model.train()
    progress = tqdm(zip(range(steps), batches, strict=False), total=steps, desc=label, leave=False, mininterval=0.5)
    for step, batch in progress:
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0:
            progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
    model.eval()
    return losses


@torch.no_grad()
def answers(
    model: Any, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], batch_size: int = 100
) -> list[str]:
    """Answers the first question of each example by greedy decoding."""
    collate = Collator(tokenizer, prompts_only=True)
    texts: list[str] = []
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size])
        generated = model.generate(**batch, max_new_tokens=5, do_sample=False)
        new = generated[:, batch["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> float:
    """Returns the share of examples whose answer is right word for word, in per cent."""
    given = answers(model, tokenizer, examples)
    right = sum(text.strip() == example.answer for text, example in zip(given, examples, strict=True))
    return 100 * right / len(examples)
