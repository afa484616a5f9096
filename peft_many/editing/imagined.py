"""Samples of a task that nobody saw: its prompts, image tokens drawn at random, and its own adapter's answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.spread import gaussian
from ..families.instructions import are_placeholders
from ..files.statistics import TaskStatistics
from ..files.stored_features import FeatureStatistics, Prompts
from ..statistics.forward import device_of

_AT_ONCE = 16  # prompts that are answered together


def check_prompts(tasks: Mapping[str, TaskStatistics], base: nn.Module) -> None:
    """Prompts that were kept have to be ones that the model can read, or there is a `ValueError`."""
    weight = _embedding(base).weight
    for name, task in tasks.items():
        if (prompts := task.prompts) is None:
            continue
        width = None if prompts.image_tokens is None else len(prompts.image_tokens.prototype)
        shown = bool(are_placeholders(prompts.ids, base).any())
        if prompts.ids.max() >= len(weight) or width not in (None, weight.shape[1]) or (shown and width is None):
            raise ValueError(f"The prompts that were kept of '{name}' are not of this base model.")


def imagined(model: Any, prompts: Prompts, most: int | None) -> list[dict[str, Tensor]]:
    """Batches of the active adapter's answers to prompts, as the model's keyword arguments: `most` of them, or each.

    If there are fewer prompts than `most`, they are shown further pictures in turn. Shorter prompts are padded on the
    left, and shorter answers on the right. Labels are the answers.
    """
    base, generator = model.get_base_model(), torch.Generator().manual_seed(0)
    count = len(prompts.ids)
    many = count if most is None or (most > count and prompts.image_tokens is None) else most
    chosen = torch.arange(many) % count
    lengths = (prompts.ids[chosen] >= 0).sum(1)
    found = []
    for rows in lengths.argsort(stable=True).split(_AT_ONCE):
        ids = prompts.ids[chosen[rows], prompts.ids.shape[1] - int(lengths[rows].max()) :].long()
        embeds, kept = _embedded(base, ids, prompts.image_tokens, generator), (ids >= 0).to(device_of(model))
        answers, said = _answered(model, embeds, kept, prompts.answer_tokens)
        found.append(
            {
                "inputs_embeds": torch.cat([embeds, _embedding(base)(answers).to(embeds)], dim=1),
                "attention_mask": torch.cat([kept, said], dim=1).long(),
                "labels": torch.cat([torch.full_like(kept, -100, dtype=torch.long), answers.where(said, -100)], dim=1),
            }
        )
    return found


def _embedding(base: Any) -> Any:
    return base.get_input_embeddings()


def _embedded(base: nn.Module, ids: Tensor, seen: FeatureStatistics | None, generator: torch.Generator) -> Tensor:
    """What enters the language model in place of token ids, `(rows, length, d)`, with image tokens that are drawn."""
    embeds: Tensor = _embedding(base)(ids.clamp(min=0).to(device_of(base)))
    places = are_placeholders(ids, base)
    if seen is not None:
        count = int(places.sum())
        drawn = seen.prototype if seen.spread is None else gaussian(seen.prototype, seen.spread, count, generator)
        embeds[places.to(embeds.device)] = drawn.to(embeds)
    return embeds


def _answered(model: Any, embeds: Tensor, kept: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Greedy answers of up to `most` tokens, `(rows, length)`, and which of these come before the end or are it.

    Not by `generate`, which does not take embeddings in every family; without a cache, as refitting takes many more
    passes than there are tokens.
    """
    base = model.get_base_model()
    named = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    ends = torch.tensor(named if isinstance(named, list) else [] if named is None else [named], device=embeds.device)
    answers, said = kept.new_empty(len(kept), 0, dtype=torch.long), kept.new_empty(len(kept), 0)
    going_on = torch.ones_like(kept[:, 0])
    while answers.shape[1] < most and going_on.any():
        logits = model(inputs_embeds=embeds, attention_mask=torch.cat([kept, said], dim=1).long()).logits
        token = logits[:, -1].argmax(-1).to(embeds.device)
        answers, said = torch.cat([answers, token[:, None]], dim=1), torch.cat([said, going_on[:, None]], dim=1)
        embeds = torch.cat([embeds, _embedding(base)(token[:, None]).to(embeds)], dim=1)
        going_on &= ~torch.isin(token, ends)
    return answers, said
