"""The ways in which models lay out images in the features that arrive at a projector, each a small function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .family import Tiles, family_of
from .image_rows import ImageRows
from .projector_call import ProjectorCall
from .prompts import PICTURE_INDEX, token_ids, tokens_of_images

ImageLayout = Callable[[ProjectorCall], ImageRows | None]

LAYOUTS: list[ImageLayout] = []  # in the order in which they are asked


def register_image_layout(layout: ImageLayout) -> ImageLayout:
    """Let a function tell which rows of a projector's input belong to which image; a decorator.

    What is registered later is asked earlier, so yours come before those of peft_many, and the first answer counts.

    Args:
        layout (`Callable[[ProjectorCall], ImageRows | None]`):
            It looks at the call of the projector and at the calls around it, and returns `None` where they are not of
            the kind that it knows.

    Example:

        ```py
        >>> import torch
        >>> from peft_many.families import ImageRows, ProjectorCall, register_image_layout


        >>> @register_image_layout
        ... def by_patch_counts(call: ProjectorCall) -> ImageRows | None:
        ...     counts = call.image_arguments.get("patch_counts")  # of `get_image_features`
        ...     if counts is None:
        ...         return None
        ...     return ImageRows(torch.as_tensor(counts), flat=True)
        ```
    """
    LAYOUTS.insert(0, layout)
    return layout


def image_rows_of(call: ProjectorCall) -> ImageRows:
    """Which rows of the features that arrive at a projector belong to which image."""
    features = call.features
    rows = next((found for layout in LAYOUTS if (found := layout(call)) is not None), None)
    if rows is None and features.dim() < 3:
        raise RuntimeError(
            f"The projector got flat vision features of shape {tuple(features.shape)}, and neither a running call of "
            "the model's `get_image_features` nor the token ids of a running `forward` say where images begin, so "
            "they cannot be told apart. `peft_many.families.register_image_layout` takes a function that tells it."
        )
    if rows is None:
        rows = ImageRows(torch.ones(len(features), dtype=torch.int64), flat=False)
    real = rows.real
    if real is None and not rows.flat and features.dim() == 3:
        real = _real_patches(features, call.arguments)
    channels_first = rows.channels_first or _has_channels_first(features, call.projector)
    return replace(rows, lengths=rows.lengths.cpu(), channels_first=channels_first, real=real)


def _real_patches(features: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """Which patches are no padding, `(entries, patches)`, by the projector's mask: Idefics 2 and, inverted, Aria."""
    for name, marks_padding in (("attention_mask", False), ("attn_mask", True)):
        mask = arguments.get(name)
        if isinstance(mask, Tensor) and not mask.is_floating_point() and mask.shape == features.shape[:2]:
            return mask.bool().cpu() ^ marks_padding
    return None


def _has_channels_first(features: Tensor, projector: nn.Module | None) -> bool:
    """Whether 4-D features are a convolution's `(images, d, height, width)`, by what the projector begins with."""
    if projector is None or features.dim() != 4:
        return False
    for module in projector.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels == features.shape[1]
        width = getattr(module, "in_features", None)
        if isinstance(width, int):
            return width == features.shape[1] and width != features.shape[-1]
    return False


def _tiles(call: ProjectorCall) -> Tiles | None:
    """How tiles or frames stand in the prompt of the model that runs."""
    family = family_of(call.model)
    return family.frames if call.modality == "video" and family.frames is not None else family.tiles


def _tokens_of_images(call: ProjectorCall) -> Tensor | None:
    tiles = _tiles(call) or Tiles(0)
    return tokens_of_images(token_ids(call.model_arguments), call.model, call.modality, tiles)


# From the most general to the most special one, as the last one is asked first.


@register_image_layout
def by_tokens(call: ProjectorCall) -> ImageRows | None:
    """Runs of placeholder tokens: of flat patches where nothing else tells, and of tiles that make up an image.

    InternVL puts all tiles of an image into one run, Idefics3 markers in between.
    """
    flat, rows = call.features.dim() <= 2, len(call.features)
    lengths = _tokens_of_images(call) if flat or _tiles(call) is not None else None
    if lengths is None or int((lengths * rows // lengths.sum()).sum()) != rows:
        return None
    return ImageRows(lengths, flat)


@register_image_layout
def by_flags(call: ProjectorCall) -> ImageRows | None:
    """InternVLChat's own code: `image_flags` marks tiles of rows without an image, of which no token is made."""
    flags, tokens = call.model_arguments.get("image_flags"), _tokens_of_images(call)
    if not isinstance(flags, Tensor) or flags.numel() != len(call.features) or flags.all():
        return None
    real = flags.reshape(-1).bool().cpu()
    number = int(real.sum())
    tiles = torch.ones(number, dtype=torch.int64) if tokens is None else tokens * number // tokens.sum()
    if tiles.sum() != number:
        return None
    # An image begins at its first tile, and what is none is an image of its own.
    first = set((tiles.cumsum(0) - tiles).tolist())
    begins = [not one or i in first for one, i in zip(real.tolist(), (real.cumsum(0) - 1).tolist())]
    lengths = torch.diff(torch.tensor([*(i for i, one in enumerate(begins) if one), len(real)]))
    return ImageRows(lengths, flat=False, real=real)


@register_image_layout
def by_rows_with_images(call: ProjectorCall) -> ImageRows | None:
    """LLaVA's own code: `images`, each a picture or its tiles; a row without any brings one that is not looked at."""
    images, ids = call.model_arguments.get("images"), token_ids(call.model_arguments)
    if images is None or not hasattr(call.model, "prepare_inputs_labels_for_multimodal"):
        return None
    tiles = torch.tensor([len(image) if image.dim() == 4 else 1 for image in images])
    if tiles.sum() != len(call.features):
        return None
    of_rows = [] if ids is None else (ids == PICTURE_INDEX).sum(1).tolist()
    seen = torch.tensor([i < number for number in of_rows for i in range(max(number, 1))])
    return ImageRows(tiles, False, real=seen.repeat_interleave(tiles) if len(seen) == len(tiles) else None)


@register_image_layout
def by_pooling(call: ProjectorCall) -> ImageRows | None:
    """Molmo 2: `(tokens, pooled)` indices of the patches that make up a token, and how many tokens an image has."""
    pooling, grids = (call.image_arguments.get(name) for name in ("image_token_pooling", "image_grids"))
    if pooling is None or grids is None:
        return None
    tokens = (grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]).cpu()
    ends = torch.stack([patches.max() + 1 for patches in pooling.cpu().split(tokens.tolist())])
    crops = torch.diff(ends // call.features.shape[1:-1].numel(), prepend=ends.new_zeros(1))
    return ImageRows(crops, flat=False, outputs=ImageRows(tokens, flat=True))


@register_image_layout
def by_attended_pictures(call: ProjectorCall) -> ImageRows | None:
    """IDEFICS: `(rows, images)` pictures, filled up with some that no token attends to."""
    pixels, mask = (call.model_arguments.get(name) for name in ("pixel_values", "image_attention_mask"))
    if mask is None or mask.dim() != 3 or pixels is None or len(call.features) != pixels.shape[:2].numel():
        return None
    seen = mask.bool().any(1).reshape(-1).cpu()
    return ImageRows(torch.ones(len(seen), dtype=torch.int64), flat=False, real=seen)


@register_image_layout
def by_aspect_ratios(call: ProjectorCall) -> ImageRows | None:
    """Mllama: `(rows, images, tiles, patches, d)`, filled up with images and tiles that a mask leaves out."""
    mask = call.model_arguments.get("aspect_ratio_mask")
    if mask is None or call.features.dim() != 5:
        return None
    images, tiles = call.features.shape[:2].numel(), call.features.shape[2]
    real = (mask * (call.model_arguments["aspect_ratio_ids"] > 0)[..., None]).reshape(-1).bool().cpu()
    return ImageRows(torch.full((images,), tiles), flat=False, leading=3, real=real)


@register_image_layout
def by_frames(call: ProjectorCall) -> ImageRows | None:
    """Videos of shape `(videos, frames, 3, height, width)`, one entry of the first dimension for each frame."""
    if call.modality != "video":
        return None
    for arguments in (call.image_arguments, *call.outer_image_arguments):
        for pixels in arguments.values():
            if isinstance(pixels, Tensor) and pixels.dim() == 5 and len(call.features) == pixels.shape[:2].numel():
                return ImageRows(torch.full((len(pixels),), pixels.shape[1]), flat=False)
    return None


@register_image_layout
def by_views(call: ProjectorCall) -> ImageRows | None:
    """DeepSeek-OCR and relatives show images as a whole in one call of the projector, and in a second one their tiles.

    What was decided for the whole holds for its tiles.
    """
    counts = call.image_arguments.get("num_local_patches")
    if counts is None or call.image_arguments.get("pixel_values_local") is None or not call.is_further:
        return None
    return ImageRows(torch.as_tensor(counts), flat=False, continues=True)


@register_image_layout
def by_sizes(call: ProjectorCall) -> ImageRows | None:
    """Pixtral towers (Mistral3, LLaVA with Pixtral): all patches in one row, `(images, 2)` sizes in pixels."""
    sizes = call.image_arguments.get("image_sizes")
    vision = getattr(getattr(call.image_model, "config", None), "vision_config", None)
    if sizes is None or vision is None:
        return None
    return ImageRows((torch.as_tensor(sizes) // vision.patch_size).prod(-1), flat=True)


@register_image_layout
def by_tiles_of_sizes(call: ProjectorCall) -> ImageRows | None:
    """LLaVA-NeXT and relatives: each image is cut into tiles by its size, one entry of the first dimension each."""
    config, sizes = getattr(call.image_model, "config", None), call.image_arguments.get("image_sizes")
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if sizes is None or pinpoints is None or config is None:
        return None
    tiles = [image_size_to_num_patches(size, pinpoints, config.vision_config.image_size) for size in sizes]
    counts = call.image_arguments.get("batch_num_images")
    if counts is not None:  # LLaVA-OneVision cuts an image only if it is the only one of its sample
        alone = [count == 1 for count in counts for _ in range(count)]
        tiles = [number if cut else 1 for number, cut in zip(tiles, alone)]
    return ImageRows(torch.tensor(tiles), flat=False)


@register_image_layout
def by_places(call: ProjectorCall) -> ImageRows | None:
    """Gemma 4: `(images or frames, patches, 2)` places, -1 for padding, which flat features are without."""
    arguments = call.image_arguments
    places = next((arguments[n] for n in ("image_position_ids", "video_position_ids") if n in arguments), None)
    if places is None:
        return None
    frames = arguments.get("num_frames_per_video")
    real = (places != -1).all(-1).cpu()
    entries = torch.ones(len(real), dtype=torch.int64) if frames is None else torch.as_tensor(frames).cpu()
    if call.features.dim() == 2:
        return ImageRows(torch.stack([part.sum() for part in real.split(entries.tolist())]), flat=True)
    return ImageRows(entries, flat=False, leading=2, real=real.reshape(-1))


@register_image_layout
def by_slices(call: ProjectorCall) -> ImageRows | None:
    """MiniCPM-V: `(slices, 2)` grids; which slices make up an image, or frames a video, the token ids tell."""
    sizes = call.image_arguments.get("target_sizes")
    if sizes is None:
        return None
    slices = torch.as_tensor(sizes).prod(-1).cpu()
    tokens = _tokens_of_images(call)
    if tokens is None:
        return ImageRows(slices, flat=True)
    ends, ends_of_slices = tokens.cumsum(0) * slices.sum() // tokens.sum(), slices.cumsum(0)
    last = torch.searchsorted(ends_of_slices, ends)
    if not torch.equal(ends_of_slices[last.clamp(max=len(slices) - 1)], ends):
        return ImageRows(slices, flat=True)
    return ImageRows(tokens, flat=True, parts=torch.diff(last, prepend=last.new_full((1,), -1)))


@register_image_layout
def by_grids(call: ProjectorCall) -> ImageRows | None:
    """Qwen-VL and relatives: `(images, 2 or 3)` grids of (time,) height and width in patches, all in one row."""
    names = ("image_grid_thw", "video_grid_thw", "image_grid_hw")
    grids = next((call.image_arguments[name] for name in names if call.image_arguments.get(name) is not None), None)
    return None if grids is None else ImageRows(torch.as_tensor(grids).prod(-1), flat=True)


@register_image_layout
def by_calls(call: ProjectorCall) -> ImageRows | None:
    """HunYuan-VL: a call for each image."""
    one_image = family_of(call.image_model).one_image_per_call
    return ImageRows(torch.ones(1, dtype=torch.int64), flat=True) if one_image else None
