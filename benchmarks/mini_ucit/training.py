"""A plain training loop and exact-match evaluation: nothing in here knows about peft_many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from .model import Collator
from .world import Example

LONGEST_ANSWER = 16  # tokens


def train(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    autocast: bool = False,
    penalty: Callable[[], torch.Tensor] | None = None,
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
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        if penalty is not None:
            loss = loss + penalty()
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


def batches_of(examples: Sequence[Example], collate: Collator, size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of `size` examples, in order; the last one may be smaller."""
    return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]


def shuffled_batches(
    examples: Sequence[Example], collate: Collator, size: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end, shuffled anew in each round."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(examples))
        for start in range(0, len(order), size):
            yield collate([examples[i] for i in order[start : start + size]])


@torch.no_grad()
def answers(model: Any, collate: Collator, examples: Sequence[Example], batch_size: int = 100) -> list[str]:
    """Answers the first question of each example by greedy decoding; `collate` makes prompts."""
    texts: list[str] = []
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size])
        generated = model.generate(**batch, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        new = generated[:, batch["input_ids"].shape[1] :]
        texts += collate.tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def accuracy(model: nn.Module, collate: Collator, examples: Sequence[Example]) -> float:
    """Returns the share of examples whose answer is right word for word, in per cent."""
    given = answers(model, collate, examples)
    right = sum(text.strip() == example.answer for text, example in zip(given, examples, strict=True))
    return 100 * right / len(examples)


@torch.no_grad()
def log_likelihood(model: Any, collate: Collator, examples: Sequence[Example], batch_size: int = 100) -> float:
    """Returns the mean log-likelihood of a token of the answers; `collate` makes whole conversations."""
    total, tokens = 0.0, 0
    for batch in batches_of(examples, collate, batch_size):
        count = int((batch["labels"][:, 1:] != -100).sum())
        total -= model(**batch).loss.item() * count
        tokens += count
    return total / tokens
