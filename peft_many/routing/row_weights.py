"""Which row of a batch the images stand in, and what their task weights make of the rows' LoRA."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import PeftWarning
from torch import Tensor, nn

from peft_many.families.calls import ImageCall

from ..algebra.gating import confidence, gates, rows_of_images
from ..families.image_layout import ImageLayout

# The arguments of a model that have a row for each sample.
_INPUTS = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class Gates:
    """What a layer's products with `A*` and with the tasks' own `A_t` are multiplied by.

    Args:
        merged (`torch.Tensor`, *optional*): `1 − c`, shape `(rows, 1)`; `None` if it is zero in all rows.
        own (`torch.Tensor`): `c α_t` repeated `r_t` times, shape `(rows, Σ r_t)`.
    """

    merged: Tensor | None
    own: Tensor


class RowWeights:
    """The task weights of a batch's rows, each the mean over the row's images.

    Args:
        sums (`torch.Tensor`): Over the images of each row, shape `(rows, tasks)`, float32.
        images (`torch.Tensor`): How many these are, shape `(rows,)`, float32.
        start (`int`): How many tokens the cache held when the last of the images came.
    """

    def __init__(self, sums: Tensor, images: Tensor, start: int) -> None:
        self.sums = sums
        self.images = images
        self.start = start
        self._gates: dict[tuple[Any, ...], Gates] = {}

    def plus(self, other: RowWeights) -> RowWeights:
        """Of both their images. Where one has several rows to each of the other's, as with beams, these share them."""
        few, many = sorted((self, other), key=lambda one: len(one.images))
        repeats = len(many.images) // len(few.images)
        sums, images = (part.repeat_interleave(repeats, dim=0).to(many.sums.device) for part in (few.sums, few.images))
        return RowWeights(many.sums + sums, many.images + images, max(self.start, other.start))

    def taken(self, rows: Tensor) -> RowWeights:
        """Of some rows, by their places or a mask, in this order."""
        places = torch.arange(len(self.images))[rows.cpu()].to(self.images.device)
        return RowWeights(self.sums[places], self.images[places], self.start)

    def gates(self, ranks: tuple[int, ...], repeats: int, like: Tensor) -> Gates | None:
        """The gates of a layer.

        Args:
            ranks (`tuple[int, ...]`): `r_t` of each task in the layer.
            repeats (`int`): How many rows the layer sees for each of these.
            like (`torch.Tensor`): Whose device and dtype they take.

        Returns:
            [`Gates`], *optional*: `None` if every row gets the merged delta.
        """
        if not self._any_open:
            return None
        key = (ranks, repeats, like.device, like.dtype)
        if key not in self._gates:
            merged, own = (
                gate.to(like.device, like.dtype).repeat_interleave(repeats, dim=0)
                for gate in gates(self._weights, self._trust, ranks)
            )
            self._gates[key] = Gates(None if self._all_open else merged, own)
        return self._gates[key]

    @functools.cached_property
    def _weights(self) -> Tensor:
        return self.sums / self.images.clamp(min=1)[:, None]

    @functools.cached_property
    def _trust(self) -> Tensor:
        return confidence(self._weights)

    # A GPU has to be asked for these two, so only once.
    @functools.cached_property
    def _any_open(self) -> bool:
        return bool((self._trust > 0).any())

    @functools.cached_property
    def _all_open(self) -> bool:
        return bool((self._trust == 1).all())


@dataclass(frozen=True)
class ImageWeights:
    """The task weights of the images that a projector was called with.

    Args:
        weights (`torch.Tensor`): Shape `(images, tasks)`, float32.
        layout ([`ImageLayout`]): How the projector's input was shared out among them.
        call ([`ImageCall`], *optional*): The `get_image_features` in which it was called.
        start (`int`): How many tokens the cache held then.
    """

    weights: Tensor
    layout: ImageLayout
    call: ImageCall | None
    start: int

    def by_row(self, model: nn.Module, arguments: Mapping[str, Any]) -> RowWeights | None:
        """The weights of the batch's rows; `None`, with a warning, where it cannot be told which images are whose.

        Args:
            model (`torch.nn.Module`): Whose config tells the token that stands for images.
            arguments (`Mapping[str, Any]`): What it was called with, by name.
        """
        images, placeholders = len(self.weights), self._placeholders(model, arguments)
        if placeholders is not None and placeholders.any():
            batch, rows = len(placeholders), rows_of_images(self._tokens(placeholders), placeholders)
        else:
            batch = next((shape[0] for shape in _shapes(arguments)), 0)
            rows = torch.arange(images) if batch == images else None
        if rows is None:
            warn_of_merged(f"it cannot be told which of {images} images belong to which of {batch} rows")
            return None
        rows = rows.to(self.weights.device)
        return RowWeights(
            self.weights.new_zeros(batch, self.weights.shape[1]).index_add(0, rows, self.weights),
            self.weights.new_zeros(batch).index_add(0, rows, self.weights.new_ones(images)),
            self.start,
        )

    def _tokens(self, placeholders: Tensor) -> Tensor:
        """How many of the batch's placeholder tokens each image fills, `(images,)`, int64."""
        told = self.call.tokens if self.call is not None else None
        if told is not None and len(told) == len(self.weights):
            return torch.tensor(told)
        if placeholders.sum() == len(self.weights):
            return torch.ones(len(self.weights), dtype=torch.int64)
        return self.layout.lengths * placeholders.sum() // self.layout.lengths.sum()

    def _placeholders(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
        """How many tokens of each row stand for images, `(rows,)`, int64, on the CPU; `None` if nothing tells."""
        modality, config = self.call.modality if self.call is not None else "image", getattr(model, "config", None)
        tokens = (getattr(config, f"{modality}_token_{end}", None) for end in ("id", "index"))
        token = next((token for token in tokens if token is not None), None)
        ids = next((ids for ids in map(arguments.get, ("input_ids", "inputs")) if ids is not None), None)
        embedded, embed = arguments.get("inputs_embeds"), getattr(model, "get_input_embeddings", None)
        if token is None:
            return None
        if ids is not None:
            stand_for = ids == token
        elif embedded is not None and callable(embed):
            placeholder = embed()(torch.tensor(token, device=embedded.device))
            stand_for = (embedded == placeholder.to(embedded)).all(dim=-1)
        else:
            return None
        return stand_for.sum(dim=1).cpu() if stand_for.dim() == 2 else None


def repeats_of_rows(x: Tensor, rows: int, arguments: Mapping[str, Any]) -> int | None:
    """How many rows of a layer's input `x` belong to each row of the batch; `None`, with a warning, if it is unclear.

    Rows of the batch may be repeated in the input, as with beams, and its tokens may lie in one dimension with them.
    Other inputs of two dimensions, such as the tokens that a router sent to an expert, could be anybody's.
    """
    told = x.dim() > 2 or any(len(x) in (shape[0], shape[:2].numel()) for shape in _shapes(arguments))
    if len(x) % rows or not told:
        warn_of_merged(f"a layer's input of shape {tuple(x.shape)} does not say what belongs to which of {rows} rows")
        return None
    return len(x) // rows


def warn_of_merged(why: str) -> None:
    """Warn that rows with images get the merged LoRA although the adapter is gated."""
    warnings.warn(f"The merged LoRA is used, not that of the images' tasks: {why}.", PeftWarning, stacklevel=3)


def _shapes(arguments: Mapping[str, Any]) -> list[torch.Size]:
    values = (arguments.get(name) for name in _INPUTS)
    return [value.shape for value in values if isinstance(value, Tensor)]
