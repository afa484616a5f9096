"""Which rows of a projector's input and output belong to which image."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..algebra.devices import moved
from ..algebra.routing import pool_segments


@dataclass(frozen=True)
class ImageRows:
    """How the rows of a projector's input and output are shared out among images, which follow one another.

    Methods take some of the images by a mask `images` of shape `(images,)`, bool, on the CPU.

    Args:
        lengths (`torch.Tensor`):
            Shape `(images,)`, int64, on the CPU: rows of each image, up to a common factor.
        flat (`bool`):
            Whether rows are patches, all leading dimensions flattened (`True`), or entries of the first dimensions
            (images or tiles).
        leading (`int`): If rows are entries, of how many of the first dimensions.
        channels_first (`bool`): Whether features are maps of a convolution, `(rows, d, height, width)`.
        real (`torch.Tensor`, *optional*):
            Shape `(rows,)`, bool, on the CPU: which rows are no padding. Of shape `(rows, patches)`: which patches.
        parts (`torch.Tensor`, *optional*):
            Shape `(images,)`, int64, on the CPU: how many entries each image has in an output that is a list. One by
            default.
        outputs ([`ImageRows`], *optional*):
            That of the projector's output, where its rows are not in proportion to those of the input.
        continues (`bool`): Whether these are parts of images that were seen as a whole, so that their task is decided.
    """

    lengths: Tensor
    flat: bool
    leading: int = 1
    channels_first: bool = False
    real: Tensor | None = None
    parts: Tensor | None = None
    continues: bool = False
    outputs: ImageRows | None = None

    def pool(self, features: Tensor) -> Tensor:
        """Mean-pooled features of each image, shape `(images, d)`, float32; of padding alone, zeros."""
        if self.channels_first:
            features = features.flatten(2).transpose(1, 2)
        width = features.shape[-1]
        if self.flat:
            rows = features.reshape(features.shape[:-1].numel(), width)
        else:
            entries = features.shape[: self.leading].numel()
            rows = features.reshape(entries, features.shape[self.leading : -1].numel(), width)
            if self.real is None or self.real.dim() == 1:
                rows = rows.mean(1, dtype=torch.float32)
        if self.real is not None:
            places = self.real.flatten().nonzero()[:, 0]  # with the mask itself a GPU would have to be waited for
            rows, counts = rows.flatten(0, -2)[moved(places, rows.device)], self._real_counts(self.real)
        elif len(rows) == len(self.lengths):
            return rows.float()
        else:
            counts = torch.bincount(self._owners(len(rows)), minlength=len(self.lengths))
        return pool_segments(rows, moved(counts, rows.device))

    @property
    def real_images(self) -> Tensor:
        """Which images are no padding, shape `(images,)`, bool, on the CPU."""
        if self.real is None:
            return torch.ones(len(self.lengths), dtype=torch.bool)
        return self._real_counts(self.real) > 0

    def _real_counts(self, real: Tensor) -> Tensor:
        """How many rows, or patches, of each image are no padding, int64, on the CPU."""
        owners = self._owners(len(real)).reshape(-1, *[1] * (real.dim() - 1)).expand_as(real)
        return torch.bincount(owners[real], minlength=len(self.lengths))

    def can_cut(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it is clear what of a projector's arguments belongs to which image."""
        features, *further = (*args, *kwargs.values())
        if self.outputs is not None or not self._has_row_dimension(features):
            return False
        images = len(self.lengths)
        return all(_concerns_all_images(one) or _has_entry_per_image(one, features, images) for one in further)

    def cut(
        self, images: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A projector's arguments as they would be if it were called with some of the images only."""
        if images.all():
            return args, kwargs
        features, *further = (*args, *kwargs.values())
        rows = moved(self._rows_of(images, features.shape[self._row_dimension]), features.device)
        values = [features.index_select(self._row_dimension, rows)]
        values += [value if _concerns_all_images(value) else _entries(value, images) for value in further]
        return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :]))

    def add_weighted(self, mixed: Any, outputs: Any, weights: Tensor, images: Tensor) -> Any:
        """Add a projector's `outputs` for some of the images, times their weights, to what is mixed for all of them.

        `mixed`, float32, is changed in place; `None` begins with zeros. `weights` are those of all images, float32, on
        the CPU.
        Outputs may be lists, tuples and model outputs of tensors if the projector was called with all images.
        """
        if outputs is None:
            return None
        if self.outputs is not None:
            return self.outputs.add_weighted(mixed, outputs, weights, images)
        if not isinstance(outputs, Tensor):
            return self._add_structure(mixed, outputs, weights, images)
        part = self._only(images)._spread(_entries(weights, images), outputs) * outputs.float()
        if images.all():
            return part if mixed is None else mixed.add_(part)
        dimension, shape = self._row_dimension, list(part.shape)
        shape[dimension] = int(shape[dimension] * self.lengths.sum() // self.lengths[images].sum())
        if mixed is None:
            mixed = part.new_zeros(shape)
        rows = self._rows_of(images, shape[dimension])
        if not self._has_row_dimension(part) or len(rows) != part.shape[dimension] or list(mixed.shape) != shape:
            raise RuntimeError(
                f"The projector's output for {int(images.sum())} of {len(images)} images has shape "
                f"{tuple(part.shape)}, which does not say what belongs to which image: images of "
                f"{self.lengths.tolist()} patches should have rows of the output in the same proportion."
            )
        return mixed.index_add_(dimension, moved(rows, part.device), part)

    def _add_structure(self, mixed: Any, outputs: Any, weights: Tensor, images: Tensor) -> Any:
        """`add_weighted` for an output that is no tensor: each part by itself."""
        by_part = weights if self.parts is None else weights.repeat_interleave(self.parts)
        if self.flat and isinstance(outputs, (list, tuple)) and len(outputs) == len(by_part):
            parts: list[Any] = [weight * part.float() for weight, part in zip(by_part, outputs)]
            return type(outputs)(parts if mixed is None else [old.add_(new) for old, new in zip(mixed, parts)])
        olds = [None] * len(outputs) if mixed is None else parts_of(mixed)
        news = [self.add_weighted(old, new, weights, images) for old, new in zip(olds, parts_of(outputs))]
        return with_parts(outputs, news)

    def _only(self, images: Tensor) -> ImageRows:
        return ImageRows(self.lengths[images], self.flat, self.leading)

    def _spread(self, weights: Tensor, outputs: Tensor) -> Tensor:
        """One weight for each image, `(images,)`, brought to a shape that multiplies the projector's `outputs`."""
        leading = outputs.shape[:-1] if self.flat else outputs.shape[: self.leading]
        weights = moved(weights[self._owners(leading.numel())], outputs.device)
        return weights.reshape((*leading, *[1] * (outputs.dim() - len(leading))))

    @property
    def _row_dimension(self) -> int:
        return -2 if self.flat else 0

    def _has_row_dimension(self, tensor: Tensor) -> bool:
        """Whether all rows lie along one dimension, so that they can be cut."""
        return tensor.shape[:-1].numel() == tensor.shape[-2] if self.flat else self.leading == 1

    def _rows_of(self, images: Tensor, rows: int) -> Tensor:
        """Which of that many rows belong to some of the images, int64, on the CPU."""
        return images[self._owners(rows)].nonzero()[:, 0]

    def _owners(self, rows: int) -> Tensor:
        """The image that each of that many rows belongs to, int64, on the CPU."""
        scaled = self.lengths * rows // self.lengths.sum()  # mergers turn several patches into one token
        if scaled.sum() != rows:
            raise RuntimeError(
                f"{rows} rows of vision features do not divide among images of {self.lengths.tolist()} patches."
            )
        return torch.arange(len(self.lengths)).repeat_interleave(scaled)


def parts_of(output: Any) -> list[Any]:
    """The entries of a list, tuple or model output."""
    return list(output.values()) if isinstance(output, ModelOutput) else list(output)


def with_parts(output: Any, parts: list[Any]) -> Any:
    """The same kind of list, tuple or model output, of other entries."""
    return type(output)(**dict(zip(output, parts))) if isinstance(output, ModelOutput) else type(output)(parts)


def _concerns_all_images(value: Any) -> bool:
    """Whether a projector's argument is a setting, the same whichever images come with it."""
    return value is None or isinstance(value, (int, float, str)) or (isinstance(value, Tensor) and value.dim() == 0)


def _has_entry_per_image(value: Any, features: Tensor, images: int) -> bool:
    """Whether a projector's argument holds a row for each image, such as its height and width.

    Plain numbers do not count as rows: the height and width of a grid that all images share are no two images. Nor do
    further features, such as those of other layers of the tower.
    """
    if isinstance(value, Tensor):
        return value.dim() > 1 and len(value) == images and value.shape != features.shape
    if type(value) not in (list, tuple) or len(value) != images or any(map(_concerns_all_images, value)):
        return False
    return not any(isinstance(entry, Tensor) and entry.shape == features.shape for entry in value)


def _entries(value: Any, images: Tensor) -> Any:
    """The entries of some of the images, of a tensor, list or tuple with one for each image."""
    if isinstance(value, Tensor):
        return value[moved(images.nonzero()[:, 0], value.device)]
    return type(value)(itertools.compress(value, images.tolist()))
