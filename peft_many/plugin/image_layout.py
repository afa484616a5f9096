"""Which rows of a projector's input and output belong to which image.

A projector sees vision features without image boundaries. The boundaries stand in the arguments of the model's public
`get_image_features` (`get_video_features`), which `forward` and `generate` both go through; those calls are watched.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ..algebra.routing import pool_segments

WATCHED_METHODS = ("get_image_features", "get_video_features")


@dataclass(eq=False)
class ImageCall:
    """One call of `get_image_features` or `get_video_features`.

    Args:
        owner (`torch.nn.Module`): The module it belongs to.
        arguments (`dict[str, Any]`): By name.
        modality (`str`): `"image"` or `"video"`.
        tokens (`list[int]`, *optional*): Once it has returned, how many tokens each image has become, if it says so.
    """

    owner: nn.Module
    arguments: dict[str, Any]
    modality: str
    tokens: list[int] | None = None


# A context variable, so that threads that share one model do not see each other's images.
_running_call: ContextVar[ImageCall | None] = ContextVar("peft_many_image_call", default=None)


@dataclass(frozen=True)
class ImageLayout:
    """How the rows of vision features are shared out among images.

    Some of the images are picked by a mask `images` of shape `(images,)`, bool, on the CPU.

    Args:
        lengths (`torch.Tensor`):
            Shape `(images,)`, int64, on the CPU: rows of each image, up to a common factor.
        flat (`bool`):
            Whether rows are patches, all leading dimensions flattened (`True`), or entries of the first dimension
            (images or tiles).
    """

    lengths: Tensor
    flat: bool

    def pool(self, features: Tensor) -> Tensor:
        """Mean-pooled features of each image, shape `(images, d)`, float32; `d` is the features' last dimension."""
        width = features.shape[-1]
        if self.flat:
            rows = features.reshape(features.shape[:-1].numel(), width)
        else:
            patches = features.reshape(len(features), features.shape[1:-1].numel(), width)
            rows = patches.mean(1, dtype=torch.float32)
        return pool_segments(rows, self._rows_of_images(len(rows)).to(rows.device))

    def can_cut(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it is clear what of a projector's arguments belongs to which image."""
        features, *further = (*args, *kwargs.values())
        return self._has_row_dimension(features) and all(
            _concerns_all_images(value) or _has_entry_per_image(value, len(self.lengths)) for value in further
        )

    def cut(
        self, images: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A projector's arguments as they would be if it were called with some of the images only."""
        if images.all():
            return args, kwargs
        features, *further = (*args, *kwargs.values())
        rows = self._rows_of(images, features.shape[self._row_dimension]).to(features.device)
        values = [features.index_select(self._row_dimension, rows)]
        values += [value if _concerns_all_images(value) else _entries(value, images) for value in further]
        return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :]))

    def add_weighted(self, mixed: Tensor | None, outputs: Tensor, weights: Tensor, images: Tensor) -> Tensor:
        """Add a projector's `outputs` for some of the images, times their weights, to what is mixed for all of them.

        Args:
            mixed (`torch.Tensor`, *optional*): Float32, changed in place; `None` begins with zeros.
            outputs (`torch.Tensor`): What the projector made of the arguments that `cut` gave.
            weights (`torch.Tensor`): Shape `(images,)`, float32, those of the other images included.
            images (`torch.Tensor`): The mask of the images that it was called with.

        Raises:
            RuntimeError: It cannot be told which rows of the outputs belong to which image.
        """
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
        return mixed.index_add_(dimension, rows.to(part.device), part)

    def _only(self, images: Tensor) -> ImageLayout:
        return ImageLayout(self.lengths[images], self.flat)

    def _spread(self, weights: Tensor, outputs: Tensor) -> Tensor:
        """One weight for each image, `(images,)`, brought to a shape that multiplies the projector's `outputs`."""
        rows = outputs.shape[:-1].numel() if self.flat else len(outputs)
        weights = weights.repeat_interleave(self._rows_of_images(rows).to(weights.device), output_size=rows)
        return weights.reshape((*outputs.shape[:-1], 1) if self.flat else (-1, *[1] * (outputs.dim() - 1)))

    @property
    def _row_dimension(self) -> int:
        return -2 if self.flat else 0

    def _has_row_dimension(self, tensor: Tensor) -> bool:
        """Whether all rows lie along one dimension, so that they can be cut."""
        return not self.flat or tensor.shape[:-1].numel() == tensor.shape[-2]

    def _rows_of(self, images: Tensor, rows: int) -> Tensor:
        """Which of that many rows belong to some of the images, int64, on the CPU."""
        return images.repeat_interleave(self._rows_of_images(rows)).nonzero()[:, 0]

    def _rows_of_images(self, rows: int) -> Tensor:
        """`lengths` scaled to that many rows: mergers turn several patches into one token."""
        scaled = self.lengths * rows // self.lengths.sum()
        if scaled.sum() != rows:
            raise RuntimeError(
                f"Cannot share {rows} rows of vision features out among images of {self.lengths.tolist()} patches."
            )
        return scaled


def _concerns_all_images(value: Any) -> bool:
    """Whether a projector's argument is a setting, the same whichever images come with it."""
    return value is None or isinstance(value, (int, float, str)) or (isinstance(value, Tensor) and value.dim() == 0)


def _has_entry_per_image(value: Any, images: int) -> bool:
    """Whether a projector's argument holds a row for each image, such as its height and width.

    Plain numbers do not count as rows: the height and width of a grid that all images share are no two images.
    """
    if isinstance(value, Tensor):
        return value.dim() > 1 and len(value) == images
    return type(value) in (list, tuple) and len(value) == images and not any(map(_concerns_all_images, value))


def _entries(value: Any, images: Tensor) -> Any:
    """The entries of some of the images, of a tensor, list or tuple with one for each image."""
    if isinstance(value, Tensor):
        return value[images.nonzero()[:, 0].to(value.device)]
    return type(value)(itertools.compress(value, images.tolist()))


def _grid_lengths(call: ImageCall) -> Tensor | None:
    """Qwen-VL and relatives: `(images, 3)` grids of time, height and width in patches."""
    grid = call.arguments.get("image_grid_thw", call.arguments.get("video_grid_thw"))
    return None if grid is None else torch.as_tensor(grid).prod(-1)


def _tile_lengths(call: ImageCall) -> Tensor | None:
    """LLaVA-NeXT and relatives: each image is cut into tiles by its size, one entry of the first dimension each."""
    config, sizes = getattr(call.owner, "config", None), call.arguments.get("image_sizes")
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if sizes is None or pinpoints is None or config is None:
        return None
    tiles = [image_size_to_num_patches(size, pinpoints, config.vision_config.image_size) for size in sizes]
    counts = call.arguments.get("batch_num_images")
    if counts is not None:  # LLaVA-OneVision cuts an image only if it is the only one of its sample
        alone = [count == 1 for count in counts for _ in range(count)]
        tiles = [number if cut else 1 for number, cut in zip(tiles, alone)]
    return torch.tensor(tiles)


def _size_lengths(call: ImageCall) -> Tensor | None:
    """Pixtral towers (Mistral3, LLaVA with Pixtral): all patches in one row, `(images, 2)` sizes in pixels."""
    sizes, patch = call.arguments.get("image_sizes"), getattr(call.owner.config, "vision_config", None)
    if sizes is None or patch is None:
        return None
    return (torch.as_tensor(sizes) // patch.patch_size).prod(-1)


# A row for each kind of layout: how the call's arguments give the lengths, and whether rows are patches. First match.
LAYOUTS: tuple[tuple[Callable[[ImageCall], Tensor | None], bool], ...] = (
    (_grid_lengths, True),
    (_tile_lengths, False),
    (_size_lengths, True),
)


def features_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A layer's or projector's input: the first argument, by position or by name."""
    features: Tensor = args[0] if args else next(iter(kwargs.values()))
    return features


def current_image_call() -> ImageCall | None:
    """The image call that is running in this thread."""
    return _running_call.get()


def current_layout(features: Tensor) -> ImageLayout:
    """The layout of the features that arrive at a projector now.

    Raises:
        RuntimeError: The features are flat patches and no watched call says where images begin.
    """
    call = _running_call.get()
    if call is not None:
        for lengths_of, flat in LAYOUTS:
            lengths = lengths_of(call)
            if lengths is not None:
                return ImageLayout(lengths.cpu(), flat)
    if features.dim() < 3:
        raise RuntimeError(
            f"The projector got flat vision features of shape {tuple(features.shape)}, and no running call of the "
            "model's `get_image_features` says where images begin, so they cannot be told apart."
        )
    return ImageLayout(torch.ones(len(features), dtype=torch.int64), flat=False)


def _token_counts(output: Any) -> list[int] | None:
    """How many tokens each image has become, from what an image method returned; `None` if it is of another form."""
    features = getattr(output, "pooler_output", output)
    if isinstance(features, Tensor) and features.dim() == 3:
        return [features.shape[1]] * len(features)
    if isinstance(features, (list, tuple)) and all(isinstance(one, Tensor) for one in features):
        return [one.shape[:-1].numel() for one in features]
    return None


class _WatchedMethod:
    """Does what the module's own image method does, and lets `current_layout` know its arguments meanwhile.

    An object that holds its module, not a bound function, so that copies and pickles of a model watch themselves.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own_method())  # which `generate` reads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.__signature__.bind(*args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        outer = _running_call.get()
        # Some families pass the frames of videos through `get_image_features`.
        videos = "video" in self.name or (outer is not None and outer.modality == "video")
        call = ImageCall(self.module, arguments, "video" if videos else "image")
        token = _running_call.set(call)
        try:
            output = self._own_method()(*args, **kwargs)
        finally:
            _running_call.reset(token)
        call.tokens = _token_counts(output)
        return output

    def _own_method(self) -> Callable[..., Any]:
        return getattr(type(self.module), self.name).__get__(self.module)


def watch_image_calls(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Watch the image methods of every part of the model that has them; returns what was newly watched.

    The methods are set on the instances; the classes stay as they are.
    """
    watched = []
    for module in model.modules():
        for name in WATCHED_METHODS:
            if callable(getattr(type(module), name, None)) and name not in module.__dict__:
                setattr(module, name, _WatchedMethod(module, name))
                watched.append((module, name))
    return watched


def unwatch_image_calls(watched: list[tuple[nn.Module, str]]) -> None:
    """Give the modules their own methods back."""
    for module, name in watched:
        module.__dict__.pop(name, None)


@contextlib.contextmanager
def watching_image_calls(model: nn.Module) -> Iterator[None]:
    """Watch for the length of a `with` block; parts that are already watched stay so."""
    watched = watch_image_calls(model)
    try:
        yield
    finally:
        unwatch_image_calls(watched)
