"""Samples of a task that nobody saw: its prompts, image tokens drawn at random, and its own adapter's answers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.devices import device_of
from ..algebra.spread import gaussian
from ..families.family import Parts
from ..families.instructions import are_placeholders
from ..families.parts import parts_of
from ..files.statistics import TaskStatistics
from ..files.stored_features import FeatureStatistics, Prompts

_AT_ONCE = 8  # prompts that are answered together


def check_prompts(tasks: Mapping[str, TaskStatistics], base: nn.Module, layers: Iterable[str]) -> None:
    """Prompts that were kept have to be ones that the model can read, and reach all layers, or there is an error."""
    parts = parts_of(base) or Parts()
    visual = tuple(f"{name}." for name in (*parts.towers, *parts.projectors))
    inside = next((layer for layer in layers if layer.startswith(visual)), None)
    if inside is not None:
        raise ValueError(
            f"'{inside}' reads pictures, and without samples there are only tokens; give samples of every task."
        )
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

    If there are fewer prompts than `most`, they are shown further pictures in turn. Prompts of a batch are of one
    length; shorter answers are padded on the right. Labels are the answers.
    """
    base, generator = model.get_base_model(), torch.Generator().manual_seed(0)
    count = len(prompts.ids)
    many = count if most is None or (most > count and prompts.image_tokens is None) else most
    chosen = torch.arange(many) % count if many >= count else torch.arange(many) * count // many
    lengths = (prompts.ids[chosen] >= 0).sum(1)
    found = []
    for length in lengths.unique().tolist():
        for rows in chosen[lengths == length].split(_AT_ONCE):
            embeds = _embedded(base, prompts.ids[rows, -length:].long(), prompts.image_tokens, generator)
            answers, said = _answered(model, embeds, prompts.answer_tokens)
            kept = said.new_ones(embeds.shape[:2])
            labels = torch.cat([answers.new_full(kept.shape, -100), answers.where(said, -100)], dim=1)
            whole = torch.cat([embeds, _embedding(base)(answers).to(embeds)], dim=1)
            found.append({**_arguments(base, whole, torch.cat([kept, said], dim=1)), "labels": labels})
    return found


def _embedding(base: Any) -> Any:
    return base.get_input_embeddings()


def _arguments(base: nn.Module, embeds: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """What a model is called with.

    Positions are said, as Qwen-VL models else shift them by what they remember of the call before.
    """
    arguments = {"inputs_embeds": embeds, "attention_mask": kept.long()}
    if _takes(base, "position_ids"):
        arguments["position_ids"] = torch.arange(embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
    return arguments


def _takes(base: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(base.forward).parameters


def _embedded(base: nn.Module, ids: Tensor, seen: FeatureStatistics | None, generator: torch.Generator) -> Tensor:
    """What enters the language model in place of token ids, `(rows, length, d)`, with image tokens that are drawn."""
    embeds: Tensor = _embedding(base)(ids.to(device_of(base)))
    places = are_placeholders(ids, base)
    if seen is not None:
        count = int(places.sum())
        drawn = seen.prototype if seen.spread is None else gaussian(seen.prototype, seen.spread, count, generator)
        embeds[places.to(embeds.device)] = drawn.to(embeds)
    return embeds


def _answered(model: Any, embeds: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Greedy answers of up to `most` tokens, `(rows, length)`, and which of these come before the end or are it.

    Not by `generate`, which does not take embeddings in every family; without a cache, as refitting takes more passes
    than most answers have tokens.
    """
    base = model.get_base_model()
    named = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    ends = torch.tensor(named if isinstance(named, list) else [] if named is None else [named], device=embeds.device)
    last = {"logits_to_keep": 1} if _takes(base, "logits_to_keep") else {}
    rows = len(embeds)
    answers = torch.empty(rows, 0, dtype=torch.long, device=embeds.device)
    said, going_on = answers.bool(), torch.ones(rows, dtype=torch.bool, device=embeds.device)
    while answers.shape[1] < most and going_on.any():
        kept = torch.cat([going_on.new_ones(rows, embeds.shape[1] - said.shape[1]), said], dim=1)
        logits = model(**_arguments(base, embeds, kept), **last).logits
        token = logits[:, -1].argmax(-1).to(embeds.device)
        answers, said = torch.cat([answers, token[:, None]], dim=1), torch.cat([said, going_on[:, None]], dim=1)
        embeds = torch.cat([embeds, _embedding(base)(token[:, None]).to(embeds)], dim=1)
        going_on &= ~torch.isin(token, ends)
    return answers, said
