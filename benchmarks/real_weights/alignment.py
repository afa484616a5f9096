"""Aligns a new projector: first it learns the captions' words alone, then with the language model that says them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from peft_many.data.batches import ChatCollator, Rows
from peft_many.data.conversations import Example

from .learning import Schedule, autocast, learn

_WARM_UP = 6_000  # pictures whose features are kept for the first part: 0.75 GB
_ROUNDS = 8
_AT_ONCE = 64


def align(
    model: Any, collator: ChatCollator, examples: Sequence[Example], schedule: Schedule, folder: Path
) -> list[dict[str, float]]:
    """Train a model's projector, and nothing else, on captions of pictures.

    Args:
        model (`FastVlmForConditionalGeneration`): Is changed.
        collator ([`ChatCollator`]): Makes the batches.
        examples (`Sequence[Example]`): Pictures with their captions.
        schedule ([`Schedule`]): Of the second part.
        folder (`Path`): Where the second part keeps its state, to go on from.

    Returns:
        `list`: Losses of the second part.
    """
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector
    projector.float().requires_grad_(True)
    if not folder.is_dir():  # else the second part has begun
        say_words(model, collator, examples[:_WARM_UP])
    losses = learn(model, collator, examples, schedule, folder, 0, "aligning")
    projector.to(model.dtype)
    return losses


def say_words(model: Any, collator: ChatCollator, examples: Sequence[Example], rounds: int = _ROUNDS) -> list[float]:
    """Train the projector so that each of its tokens lies near the embeddings of the caption's words.

    Words count by how rare they are: `log(captions / captions with the word)`. Without the language model that is a
    thousand times cheaper than its loss, and saves it most of the way.

    Returns:
        `list[float]`: The mean squared error after each round, as a share of the targets' variance.
    """
    features, targets = _features(model, collator, examples), _rare_words(model, collator, examples)
    variance = float(targets.var(dim=0).mean())
    projector: nn.Module = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.01)
    steps = rounds * -(-len(features) // _AT_ONCE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, cycle_momentum=False)
    shares = []
    for number in tqdm(range(rounds), desc="saying words", leave=False):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(number))
        errors = []
        for chosen in order.split(_AT_ONCE):
            with autocast(model.device):
                said = projector(features[chosen].to(model.device))
            error = functional.mse_loss(said.float(), targets[chosen].to(model.device)[:, None].expand_as(said))
            error.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            errors.append(error.item())
        shares.append(sum(errors) / len(errors) / variance)
    return shares


@torch.no_grad()
def _features(model: Any, collator: ChatCollator, examples: Sequence[Example]) -> Tensor:
    """(pictures, tokens, channels), in the model's dtype: what the tower sees."""
    found = []
    rows = Rows(examples)
    for start in tqdm(range(0, len(rows), _AT_ONCE), desc="looking at pictures", leave=False):
        pictures = [rows[i]["images"][0] for i in range(start, min(start + _AT_ONCE, len(rows)))]
        pixels = collator.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        with autocast(model.device):  # the projector, which it calls too, is in float32
            seen = model.get_image_features(pixel_values=pixels.to(model.device)).last_hidden_state
        found.append(seen.flatten(2).transpose(1, 2).to("cpu", model.dtype))
    return torch.cat(found)


def _rare_words(model: Any, collator: ChatCollator, examples: Sequence[Example]) -> Tensor:
    """(pictures, width): the mean embedding of each caption's tokens, weighted by how rare they are."""
    captions = [collator.processor.tokenizer(f" {example.answer}")["input_ids"] for example in examples]
    held = Counter(token for caption in captions for token in set(caption))
    embeddings = model.get_input_embeddings().weight.detach()
    targets = []
    for caption in captions:
        weights = torch.tensor([math.log(len(captions) / held[token]) + 1e-6 for token in caption])
        words = embeddings[torch.tensor(caption, device=embeddings.device)].float().cpu()
        targets.append(weights @ words / weights.sum())
    return torch.stack(targets)
