"""Which tokens of a batch are its prompts, and which of these the words of instructions: no image, no padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .prompts import placeholder_tokens, token_ids

_NO_LABEL = -100


@dataclass(frozen=True)
class Instructions:
    """The instructions of a batch."""

    ids: Tensor  # (instructions, length), int64
    kept: Tensor  # which of them are words, the same shape, bool
    told: Tensor  # whether labels told each from its answer, (instructions,), bool
    is_packed: bool  # whether a row of the batch holds several of them


def instructions_of(model: Any, arguments: Mapping[str, Any]) -> Instructions | None:
    """The instructions among a model's arguments, a row for each; `None` if there are no token ids.

    An instruction ends where the labels have its first answer. Rows into which several samples are packed, by position
    ids that begin anew, are cut.
    """
    ids = token_ids(arguments)
    if ids is None or not ids.numel():
        return None
    kept = _no_padding(ids, arguments, model) & (ids >= 0) & ~are_placeholders(ids, model)
    answered = _answered(ids, arguments, model)
    cuts = _cuts(ids, arguments)
    if cuts is not None:
        ids, kept, answered = (_cut(part, cuts) for part in (ids, kept, answered))
        samples = kept.any(1)  # the others are padding
        ids, kept, answered = ids[samples], kept[samples], answered[samples]
    asked = kept & (answered.cumsum(1) == 0)
    # Where everything is an answer, as for models that are trained on plain text, all of it may be an instruction.
    told = asked.any(1)
    kept = torch.where(told[:, None], asked, kept)
    return Instructions(ids.masked_fill(~kept, 0), kept, told & _tells(arguments, model), cuts is not None)


@dataclass(frozen=True)
class PromptRows:
    """Where the prompts and the answers of a batch are, each of the same shape `(rows, length)`."""

    ids: Tensor  # int64
    asked: Tensor  # which are a prompt's tokens, those in place of images included, bool
    answered: Tensor  # which are an answer's, bool


def prompts_of(model: Any, arguments: Mapping[str, Any]) -> PromptRows:
    """The prompts among a model's arguments: what comes before the first answer in `labels`.

    A `ValueError` where they cannot be told: there are no token ids, no labels, or several samples in a row.
    """
    ids = token_ids(arguments)
    why = None
    if ids is None or _has_encoder(model):
        why = "the model is not called with `input_ids` of a decoder"
    elif not isinstance(arguments.get("labels"), Tensor):
        why = "the batches have no `labels` that are -100 on the prompt"
    elif _cuts(ids, arguments) is not None:
        why = "the batches have several samples in a row"
    if ids is None or why is not None:
        raise ValueError(f"Prompts cannot be kept, since {why}.")
    tokens, answered = _no_padding(ids, arguments, model), _answered(ids, arguments, model)
    return PromptRows(ids, tokens & (answered.cumsum(1) == 0), answered)


def are_placeholders(ids: Tensor, model: Any) -> Tensor:
    """Which token ids stand for parts of images or videos."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in {*placeholder_tokens(model, "image"), *placeholder_tokens(model, "video")}:
        found |= ids == token  # a tensor of them would have to be copied to a GPU in every call
    return found


def _tells(arguments: Mapping[str, Any], model: Any) -> bool:
    """Whether labels tell what is no answer; token ids that an encoder reads, or a classifier, never are."""
    return isinstance(arguments.get("labels"), Tensor) or _has_encoder(model)


def _answered(ids: Tensor, arguments: Mapping[str, Any], model: Any) -> Tensor:
    """Which token ids are answers, by labels of the same shape."""
    labels = arguments.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != ids.shape or _has_encoder(model):
        return torch.zeros_like(ids, dtype=torch.bool)
    return labels.to(ids.device) != _NO_LABEL


def _has_encoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _no_padding(ids: Tensor, arguments: Mapping[str, Any], model: Any) -> Tensor:
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == len(ids) and mask.shape[1] >= ids.shape[1]:
        return mask[:, mask.shape[1] - ids.shape[1] :].to(ids.device) != 0  # it may be of cached tokens too
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    padding, end = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    ends = end if isinstance(end, list) else [end]
    return ids != padding if padding is not None and padding not in ends else torch.ones_like(ids, dtype=torch.bool)


def _cuts(ids: Tensor, arguments: Mapping[str, Any]) -> list[list[int]] | None:
    """The lengths of the samples that are packed into each row; `None` where each row is one."""
    places, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    if not isinstance(places, Tensor) or places.shape != ids.shape or mask is not None:
        return None
    begins = torch.nn.functional.pad(places[:, 1:] <= places[:, :-1], (1, 0), value=True)
    starts = [[*row.nonzero()[:, 0].tolist(), ids.shape[1]] for row in begins.cpu()]
    return [[b - a for a, b in pairwise(row)] for row in starts] if any(len(row) > 2 for row in starts) else None


def _cut(part: Tensor, lengths: list[list[int]]) -> Tensor:
    return pad_sequence([piece for row, sizes in zip(part, lengths) for piece in row.split(sizes)], batch_first=True)
