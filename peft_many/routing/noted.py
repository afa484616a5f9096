"""What was noted in a call: the images that were encoded, which rows of its batch they stand in, and what is asked."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.gating import rows_of_images
from ..families.image_rows import ImageRows
from ..families.prompts import PICTURE_INDEX, placeholder_tokens, token_ids
from ..families.structure import embeddings_of
from .instructions import features_of_instructions, router_of
from .row_weights import RowWeights, cached_length, refuse_checkpointing, shapes_of_batch, warn_of_merged
from .task_router import InstructionRouter


@dataclass(eq=False)
class ImageMethod:
    """What one run of an image method told of its images."""

    modality: str = "image"  # or "video"
    tokens: list[int] | None = None  # once it has returned: how many each image has become, if it says so


@dataclass(frozen=True)
class ImageWeights:
    """The task weights of the images that a projector was called with."""

    weights: Tensor  # (images, tasks), float32, on the CPU
    fits: Tensor | None  # which tasks take each, (images, tasks), bool, on the CPU; `None` if any may
    rows: ImageRows  # how the projector's input was shared out among them
    method: ImageMethod | None  # the `get_image_features` in which it was called
    start: int  # how many tokens the cache held then

    def by_row(self, model: nn.Module, arguments: Mapping[str, Any]) -> RowWeights | None:
        """The weights of a batch's rows; `None`, with a warning, where it cannot be told which images are whose."""
        real, (batch, rows) = self.rows.real_images, self.places(model, arguments)
        weights = self.weights[real]
        if rows is None:
            warn_of_merged(f"it cannot be told which of {len(weights)} images belong to which of {batch} samples")
            return None
        return RowWeights(
            weights.new_zeros(batch, weights.shape[1]).index_add(0, rows, weights),
            weights.new_zeros(batch).index_add(0, rows, weights.new_ones(len(weights))),
            self.start,
            # A row may show images of several kinds; as strange as none is one whose images are all strange.
            fits=None
            if self.fits is None
            else weights.new_zeros(batch, weights.shape[1]).index_add(0, rows, self.fits[real].to(weights)) > 0,
        )

    def places(self, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, Tensor | None]:
        """How many rows a batch has, and which of them each image stands in, `(images,)`, if that can be told."""
        real = self.rows.real_images
        placeholders = self._placeholders(model, arguments)
        if placeholders is not None:
            return len(placeholders), rows_of_images(self._tokens(placeholders, real), placeholders)
        batch, images = next((shape[0] for shape in shapes_of_batch(arguments)), 0), int(real.sum())
        return batch, torch.arange(images) if batch == images else None

    def _tokens(self, placeholders: Tensor, real: Tensor) -> Tensor:
        """How many of the batch's placeholder tokens each `real` image fills, `(images,)`, int64."""
        told = self.method.tokens if self.method is not None else None
        if told is not None and len(told) == len(real):
            return torch.tensor(told)[real]
        lengths = self.rows.lengths[real]
        if placeholders.sum() == len(lengths):
            return torch.ones_like(lengths)
        return lengths * placeholders.sum() // lengths.sum()

    def _placeholders(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
        """How many tokens of each row stand for images, `(rows,)`, int64, on the CPU; `None` if nothing tells."""
        modality = self.method.modality if self.method is not None else "image"
        for token in (*placeholder_tokens(model, modality), PICTURE_INDEX):
            found = _which_are(token, model, arguments)
            counts = None if found is None else found.sum(dim=1).cpu()
            if counts is not None and counts.any():
                return counts
        return None


def _which_are(token: int, model: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """Where a token stands in a batch, `(rows, length)`, bool; `None` if nothing tells."""
    ids, embedded = token_ids(arguments), arguments.get("inputs_embeds")
    if ids is not None:
        return ids == token
    embeddings = embeddings_of(model)
    if embedded is None or token < 0 or embeddings is None:
        return None
    placeholder = embeddings(torch.tensor(token, device=embedded.device))
    return (embedded == placeholder.to(embedded)).all(dim=-1)


class Noted:
    """What is known in a call of the task weights of its batch's rows, by adapter; `before` is from earlier calls.

    `has_instructions` says whether the call's token ids are what is asked, and not a step of answering it. They are
    read when a layer asks what is known, so that adapters that are not active cost nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: Mapping[str, Any],
        before: Mapping[str, RowWeights] | Noted,
        has_instructions: bool = False,
    ) -> None:
        self._model = weakref.ref(model)
        self._has_instructions = has_instructions
        self._arguments = arguments
        self._before = before
        self._images: dict[str, list[ImageWeights]] = {}
        self._known: dict[str, RowWeights | None] = {}

    def add(self, adapter_name: str, images: ImageWeights) -> None:
        """Note images that were encoded."""
        noted = self._images.setdefault(adapter_name, [])
        if noted and noted[-1].method is images.method is not None:
            noted.pop()  # of several projectors the last one is nearest to the language model
        noted.append(images)
        self._known.pop(adapter_name, None)

    def get(self, adapter_name: str) -> RowWeights | None:
        """The task weights of the batch's rows; `None` where nothing tells so far."""
        model = self._model()
        if adapter_name not in self._known and model is not None:
            found = self._before.get(adapter_name)
            for images in self._images.get(adapter_name, []):
                rows = images.by_row(model, self._arguments)
                if rows is None:
                    found = None
                    break
                found = rows if found is None else found.plus(rows)
            router = router_of(model, adapter_name) if self._has_instructions else None
            if router is not None:
                refuse_checkpointing(model, adapter_name)
                asked = _by_instructions(model, self._arguments, router)
                if asked is None:
                    found = None if found is None else found.by_images()
                else:
                    found = asked if found is None else found.plus(asked)
            self._known[adapter_name] = found
        return self._known.get(adapter_name)

    def scores_of_images(self, adapter_name: str, images: ImageWeights) -> Tensor | None:
        """By the instructions of their rows, the tasks' scores of images that are being encoded, `(images, tasks)`."""
        model, known = self._model(), self.get(adapter_name)
        if model is None or known is None or known.scores is None:
            return None
        batch, rows = images.places(model, self._arguments)
        if rows is None:
            return None
        return known.scores[rows // max(1, batch // len(known.images))]

    @property
    def any_images(self) -> bool:
        """Whether images were encoded in this call."""
        return bool(self._images)

    def __iter__(self) -> Iterator[str]:
        """The adapters of which something was noted, or asked for, so far."""
        yield from dict.fromkeys((*self._before, *self._images, *self._known))

    def all_row_weights(self) -> dict[str, RowWeights]:
        """Those of every adapter of which they are known."""
        found = {name: self.get(name) for name in tuple(self)}
        return {name: weights for name, weights in found.items() if weights is not None}


def _by_instructions(model: nn.Module, arguments: Mapping[str, Any], router: InstructionRouter) -> RowWeights | None:
    """What a batch's instructions say of its rows; `None`, with a warning, where they cannot be read."""
    read = features_of_instructions(model, arguments)
    if read is None or read[0].is_packed:
        why = "its rows hold several samples each" if read else "the model was not called with token ids"
        by_images = {"instead": "The LoRA is chosen by images alone"} if router.uses_images else {}
        warn_of_merged(f"instructions cannot be read, since {why}", **by_images)
        return None
    scores = router.scores(read[1])
    start = cached_length(arguments.get("past_key_values"))
    return RowWeights(torch.zeros_like(scores), scores.new_zeros(len(scores)), start, scores)
