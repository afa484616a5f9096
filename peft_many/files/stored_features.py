"""Features of a task's images and instructions in a statistics file, and prompts that it asks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..algebra.covariance import Covariance
from .errors import StatisticsError
from .stored_covariance import check_covariance, read_covariance, read_tensor
from .tensor_file import TensorFile

# In the places of projectors' paths, which no module is called by.
INSTRUCTIONS, IMAGE_TOKENS = "(instructions)", "(image tokens)"
PROMPTS = "prompts"  # in the keys of tensors
_MOST_COUNTED = 2**53  # images or tokens, beyond which float64 is not exact
MOST_ANSWER_TOKENS = 1024  # that a stranger's file can have generated for each prompt


@dataclass(frozen=True)
class FeatureStatistics:
    """What was measured of a task's images where they arrive at one projector, of its instructions or image tokens."""

    prototype: Tensor = field(repr=False)  # mean of the images' mean-pooled projector inputs, or of the others; (d,)
    spread: Covariance | None  # of these features about the prototype, if of two or more
    count: int  # images, instructions or image tokens


@dataclass(frozen=True)
class Prompts:
    """Prompts of a task, and what is known of the tokens of their images: enough to imagine samples of it.

    Args:
        ids (`torch.Tensor`): Token ids, `(prompts, length)`, int32; -1 on the left of shorter prompts.
        answer_tokens (`int`): How long answers were, at most.
        image_tokens ([`FeatureStatistics`], *optional*): Where they enter the language model, if there were images.
    """

    ids: Tensor = field(repr=False)
    answer_tokens: int
    image_tokens: FeatureStatistics | None = None

    @classmethod
    def in_turn(
        cls, prompts: Iterable[Sequence[Tensor]], most: int, answer_tokens: int, image_tokens: FeatureStatistics | None
    ) -> Prompts:
        """Up to `most` of several lists of prompts, token ids `(length,)` each: one of each list in turn."""
        mixed = itertools.chain.from_iterable(itertools.zip_longest(*prompts))
        rows = [row for row in mixed if row is not None][:most]
        ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
        return cls(ids, answer_tokens, image_tokens)

    def to_dict(self) -> dict[str, Any]:
        """What the header of a statistics file says."""
        seen = self.image_tokens and about_features(self.image_tokens, "count")
        return {"answer_tokens": self.answer_tokens, "image_tokens": seen}


def about_features(seen: FeatureStatistics, counted: str) -> dict[str, Any]:
    """What the header of a statistics file says."""
    return {counted: seen.count, "spread": seen.spread and seen.spread.numbers()}


def image_tokens_of(prompts: Prompts | None) -> dict[str, FeatureStatistics]:
    """Those of some prompts, by what stands for a projector's path."""
    return {} if prompts is None or prompts.image_tokens is None else {IMAGE_TOKENS: prompts.image_tokens}


def tensors_of_features(features: Mapping[str, FeatureStatistics]) -> dict[str, Tensor]:
    """The tensors of features that are known by projectors' paths, or what stands for these."""
    found: dict[str, Tensor] = {}
    for name, seen in features.items():
        for part, tensor in (seen.spread.tensors() if seen.spread is not None else {}).items():
            found[f"spread.{name}.{part}"] = tensor
        found[f"prototype.{name}"] = seen.prototype
    return found


def read_features(file: TensorFile, t: int, name: str, about: dict[str, Any], counted: str) -> FeatureStatistics:
    """Task `t`'s features, of which the header says `about`."""
    prototype, count = read_tensor(file, f"{t}.prototype.{name}", 1), int(about[counted])
    if not 1 <= count <= _MOST_COUNTED:
        raise StatisticsError(f"{file.path}: '{t}.prototype.{name}' is said to be the mean of {count}.")
    if not torch.isfinite(prototype).all():
        raise StatisticsError(f"{file.path}: tensor '{t}.prototype.{name}' holds NaN or Inf.")
    if about["spread"] is None:
        return FeatureStatistics(prototype, None, count)
    spread = read_covariance(file, f"{t}.spread.{name}", about["spread"])
    words = {INSTRUCTIONS: "the spread of the instructions", IMAGE_TOKENS: "the spread of the image tokens"}
    where = words.get(name, f"the spread of the images at '{name}'")
    if spread.width != len(prototype):
        raise StatisticsError(f"{file.path}: {where} has width {spread.width}, and their prototype {len(prototype)}.")
    check_covariance(spread, f"{file.path}: {where}")
    return FeatureStatistics(prototype, spread, count)


def read_prompts(file: TensorFile, t: int, about: dict[str, Any]) -> Prompts:
    """Task `t`'s prompts, of which the header says `about`."""
    ids, longest = read_tensor(file, f"{t}.{PROMPTS}", 2, torch.int32), int(about["answer_tokens"])
    if not 1 <= longest <= MOST_ANSWER_TOKENS:
        raise StatisticsError(
            f"{file.path}: answers to its prompts are said to be {longest} tokens long, not 1 to {MOST_ANSWER_TOKENS}."
        )
    begun = (ids >= 0).cummax(1).values if ids.numel() else ids
    if not ids.numel() or ids.min() < -1 or not (begun == (ids >= 0)).all() or not begun[:, -1].all():
        raise StatisticsError(f"{file.path}: tensor '{t}.{PROMPTS}' holds no prompts: token ids, after any -1.")
    seen = about["image_tokens"]
    tokens = None if seen is None else read_features(file, t, IMAGE_TOKENS, seen, "count")
    return Prompts(ids, longest, tokens)
