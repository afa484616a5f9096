"""The hooks that keep a task's prompts, and sum up their image tokens where they enter the language model."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from peft.utils import PeftWarning
from torch import Tensor, nn

from ..families.instructions import are_placeholders, prompts_of
from ..families.parts import parts_of
from ..files.processes import Processes
from ..files.stored_features import IMAGE_TOKENS, MOST_ANSWER_TOKENS, Prompts
from ..routing.watched import arguments_of
from .features import MOST_KEPT, PooledFeatures, finished, gather_features


class PromptHooks:
    """Keeps the first `count` prompts while the `with` block runs, and some image tokens of each."""

    def __init__(self, model: nn.Module, count: int) -> None:
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"`keep_prompts` must be a whole number of at least 0, but it is {count!r}.")
        self.model, self.count = model, count
        self.prompts: list[Tensor] = []  # token ids, (length,), int32, on the CPU
        self.answer_tokens = 0
        self.image_tokens: dict[str, PooledFeatures] = {}
        self._shape = torch.Size()  # of the running call's token ids
        self._places = torch.empty(0, 2, dtype=torch.int64)  # of its image tokens that are summed up
        self._generator = torch.Generator().manual_seed(0)
        self._hooks = ExitStack()

    def __enter__(self) -> PromptHooks:
        if self.count:
            parts = parts_of(self.model)
            path = parts.language_model if parts is not None else None
            self._hooks.enter_context(self.model.register_forward_pre_hook(self._begins, with_kwargs=True))
            if path:
                language_model = self.model.get_submodule(path)
                self._hooks.enter_context(language_model.register_forward_pre_hook(self._enters, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        left = self.count - len(self.prompts)
        self._places = self._places[:0]
        if left <= 0:
            return
        rows = prompts_of(model, arguments_of(model.forward, args, kwargs))
        ids, asked, answered = (part[:left].cpu() for part in (rows.ids, rows.asked, rows.answered))
        if (ids[asked] < 0).any():
            raise ValueError("Prompts cannot be kept, since token ids below zero stand for images.")
        asked &= answered.any(1, keepdim=True)  # a row without an answer may be one that was cut off
        images = asked & are_placeholders(ids, model)
        self.prompts += [row[kept].int() for row, kept in zip(ids, asked) if kept.any()]
        self.answer_tokens = max(self.answer_tokens, int(_first_run(answered).sum(1).max()))
        self._shape = rows.ids.shape
        self._places = torch.cat([self._some(row, places.nonzero()[:, 0]) for row, places in enumerate(images)])

    def _some(self, row: int, places: Tensor) -> Tensor:
        """An even share of a row's image tokens, at random: all in all as many as are kept of features."""
        most = -(-MOST_KEPT // self.count)
        chosen = places[torch.randperm(len(places), generator=self._generator)[:most]]
        return torch.stack([torch.full_like(chosen, row), chosen], dim=1)

    def _enters(self, language_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeds = arguments_of(language_model.forward, args, kwargs).get("inputs_embeds")
        if isinstance(embeds, Tensor) and embeds.shape[:2] == self._shape and len(self._places):
            rows, columns = self._places.to(embeds.device).unbind(1)
            tokens = embeds[rows, columns]
            self.image_tokens.setdefault(IMAGE_TOKENS, PooledFeatures.none_of(tokens)).add(tokens)

    def result(self) -> dict[str, PooledFeatures]:
        """The image tokens, under one name; nothing if there were none."""
        return finished(self.image_tokens, "The image tokens hold NaN or Inf where they enter the language model.")


def _first_run(answered: Tensor) -> Tensor:
    """Of the answers in each row, `(rows, length)`, bool, the first."""
    over = (answered.cumsum(1) > 0) & ~answered
    return answered & (over.cumsum(1) == 0)


def gather_prompts(hooks: PromptHooks, processes: Processes) -> Prompts | None:
    """The prompts of all processes together, `None` if none were to be kept."""
    if not hooks.count:
        return None
    seen = gather_features(processes.together(hooks.result), processes).get(IMAGE_TOKENS)
    everyone = processes.every(lambda: (hooks.prompts, hooks.answer_tokens))
    prompts = [found for found, _ in everyone if found]
    longest = min(max(tokens for _, tokens in everyone), MOST_ANSWER_TOKENS)
    shown = any(are_placeholders(one, hooks.model).any() for found in prompts for one in found)
    if shown and (seen is None or seen.spread is None or seen.spread.trace == 0):
        why = "the images of this model do not enter its language model as tokens of their own"
    elif not prompts or not longest:
        why = "no batch had a prompt with an answer"
    else:
        return Prompts.in_turn(prompts, hooks.count, longest, seen)
    warnings.warn(f"No prompts were kept, since {why}; `refit_merge` will need samples.", PeftWarning, stacklevel=4)
    return None
