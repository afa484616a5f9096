"""How the features that arrive at a projector are shared out among images: a row for each way that models tell it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .calls import ImageCall, current_image_call, current_model_call
from .image_layout import ImageLayout
from .rows import Tiles, exceptional


def features_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A layer's or projector's input: the first argument, by position or by name."""
    features: Tensor = args[0] if args else next(iter(kwargs.values()))
    return features


def vision_features_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a projector's images are told by: its input, or what the vision tower gave in front of a Q-Former."""
    call = current_image_call()
    return features_of(args, kwargs) if call is None or call.encoded is None else call.encoded


def current_layout(
    features: Tensor, projector: nn.Module | None = None, further: Mapping[str, Any] | None = None
) -> ImageLayout:
    """The layout of the features that arrive at a projector now.

    Args:
        features (`torch.Tensor`): The projector's input.
        projector (`torch.nn.Module`, *optional*): It tells which dimension of a convolution's map holds channels.
        further (`Mapping[str, Any]`, *optional*): Its arguments by name, of which a mask tells padding of patches.

    Raises:
        RuntimeError: The features are flat patches, and nothing says where images begin.
    """
    call = current_image_call()
    layout = next((found for way in LAYOUTS if (found := way(call, features, projector)) is not None), None)
    if layout is None and features.dim() < 3:
        raise RuntimeError(
            f"The projector got flat vision features of shape {tuple(features.shape)}, and neither a running call of "
            "the model's `get_image_features` nor the token ids of a running `forward` say where images begin, so "
            "they cannot be told apart."
        )
    if layout is None:
        layout = ImageLayout(torch.ones(len(features), dtype=torch.int64), flat=False)
    real = layout.real
    if real is None and not layout.flat and features.dim() == 3:
        real = _real_patches(features, further or {})
    return replace(layout, channels_first=_has_channels_first(features, projector), real=real)


def _real_patches(features: Tensor, further: Mapping[str, Any]) -> Tensor | None:
    """Which patches are no padding, `(entries, patches)`, by the projector's mask: Idefics 2 and, inverted, Aria."""
    for name, marks_padding in (("attention_mask", False), ("attn_mask", True)):
        mask = further.get(name)
        if isinstance(mask, Tensor) and not mask.is_floating_point() and mask.shape == features.shape[:2]:
            return mask.bool().cpu() ^ marks_padding
    return None


def _by_call(call: ImageCall | None, features: Tensor, projector: nn.Module | None) -> ImageLayout | None:
    """HunYuan-VL: a call for each image."""
    if call is None or not exceptional(call.owner).one_by_one:
        return None
    return ImageLayout(torch.ones(1, dtype=torch.int64), flat=True)


def _by_grid(call: ImageCall | None, features: Tensor, projector: nn.Module | None) -> ImageLayout | None:
    """Qwen-VL and relatives: `(images, 2 or 3)` grids of (time,) height and width in patches, all in one row."""
    for name in ("image_grid_thw", "video_grid_thw", "image_grid_hw"):
        if call is not None and call.arguments.get(name) is not None:
            return ImageLayout(torch.as_tensor(call.arguments[name]).prod(-1).cpu(), flat=True)
    return None


def _by_slice(call: ImageCall | None, features: Tensor, projector: nn.Module | None) -> ImageLayout | None:
    """MiniCPM-V: `(slices, 2)` grids; which slices make up an image, or frames a video, the token ids tell."""
    sizes = None if call is None else call.arguments.get("target_sizes")
    if sizes is None:
        return None
    slices = torch.as_tensor(sizes).prod(-1).cpu()
    tokens = _tokens_of_images(call)
    if tokens is None:
        return ImageLayout(slices, flat=True)
    ends, ends_of_slices = tokens.cumsum(0) * slices.sum() // tokens.sum(), slices.cumsum(0)
    last = torch.searchsorted(ends_of_slices, ends)
    if not torch.equal(ends_of_slices[last.clamp(max=len(slices) - 1)], ends):
        return ImageLayout(slices, flat=True)
    return ImageLayout(tokens, flat=True, parts=torch.diff(last, prepend=last.new_full((1,), -1)))


def _by_place(call: ImageCall | None, features: Tensor, projector: nn.Module | None) -> ImageLayout | None:
    """Gemma 4: `(images or frames, patches, 2)` places, -1 for padding, which flat features are without."""
    arguments = {} if call is None else call.arguments
    places = next((arguments[n] for n in ("image_position_ids", "video_position_ids") if n in arguments), None)
    if places is None:
        return None
    frames = arguments.get("num_frames_per_video")
    real = (places != -1).all(-1).cpu()
    entries = torch.ones(len(real), dtype=torch.int64) if frames is None else torch.as_tensor(frames).cpu()
    if features.dim() == 2:
        return ImageLayout(torch.stack([part.sum() for part in real.split(entries.tolist())]), flat=True)
    return ImageLayout(entries, flat=False, leading=2, real=real.reshape(-1))


def _by_resolution(call: ImageCall | None, features: Tensor, projector: nn.Module | None) -> ImageLayout | None:
    """LLaVA-NeXT and relatives: each image is cut into tiles by its size, one entry of the first dimension each."""
    if call is None:
        return None
    config, sizes = getattr(call.owner, "config", None), call.arguments.get("image_sizes")
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if sizes is None or pinpoints is None or config is None:
        return None
    tiles = [image_size_to_num_patches(size, pinpoints, config.vision_config.image_size) for size in sizes]
    counts = call.arguments.get("batch_num_images")
    if counts is not None:  # LLaVA-OneVision cuts an image only if it is the only one of its sample
        alone = [count == 1 for count in counts for _ in range(count)]
        tiles = [number if cut else 1 for number, cut in zip(tiles, alone)]
    return ImageLayout(torch.tensor(tiles), flat=False)


def _by_size(call: ImageCall | None, features: Tensor, projector: nn.Module | None) -> ImageLayout | None:
    """Pixtral towers (Mistral3, LLaVA with Pixtral): all patches in one row, `(images, 2)` sizes in pixels."""
    if call is None:
        return None
    sizes, patch = call.arguments.get("image_sizes"), getattr(call.owner.config, "vision_config", None)
    if sizes is None or patch is None:
        return None
    return ImageLayout((torch.as_tensor(sizes) // patch.patch_size).prod(-1).cpu(), flat=True)


def _by_view(call: ImageCall | None, features: Tensor, projector: nn.Module | None) -> ImageLayout | None:
    """DeepSeek-OCR and relatives show images as a whole in one call, and in a second one their tiles.

    What was decided for the whole holds for its tiles.
    """
    counts = None if call is None else call.arguments.get("num_local_patches")
    if call is None or counts is None or call.arguments.get("pixel_values_local") is None:
        return None
    if projector not in call.decided:
        return None
    return ImageLayout(torch.as_tensor(counts).cpu(), flat=False, continues=True)


def _by_frames(call: ImageCall | None, features: Tensor, projector: nn.Module | None) -> ImageLayout | None:
    """Videos of shape `(videos, frames, 3, height, width)`, one entry of the first dimension for each frame."""
    while call is not None and call.modality == "video":
        for pixels in call.arguments.values():
            if isinstance(pixels, Tensor) and pixels.dim() == 5 and len(features) == pixels.shape[:2].numel():
                return ImageLayout(torch.full((len(pixels),), pixels.shape[1]), flat=False)
        call = call.outer
    return None


def _by_aspect(call: ImageCall | None, features: Tensor, projector: nn.Module | None) -> ImageLayout | None:
    """Mllama: `(rows, images, tiles, patches, d)`, filled up with images and tiles that a mask leaves out."""
    mask = current_model_call()[1].get("aspect_ratio_mask")
    if mask is None or features.dim() != 5:
        return None
    images, tiles = features.shape[:2].numel(), features.shape[2]
    real = (mask * (current_model_call()[1]["aspect_ratio_ids"] > 0)[..., None]).reshape(-1).bool().cpu()
    return ImageLayout(torch.full((images,), tiles), flat=False, leading=3, real=real)


def _by_sight(call: ImageCall | None, features: Tensor, projector: nn.Module | None) -> ImageLayout | None:
    """IDEFICS: `(rows, images)` pictures, filled up with some that no token attends to."""
    pixels, mask = (current_model_call()[1].get(name) for name in ("pixel_values", "image_attention_mask"))
    if mask is None or mask.dim() != 3 or pixels is None or len(features) != pixels.shape[:2].numel():
        return None
    seen = mask.bool().any(1).reshape(-1).cpu()
    return ImageLayout(torch.ones(len(seen), dtype=torch.int64), flat=False, real=seen)


def _by_pooling(call: ImageCall | None, features: Tensor, projector: nn.Module | None) -> ImageLayout | None:
    """Molmo 2: `(tokens, pooled)` indices of the patches that make up a token, and how many tokens an image has."""
    pooling, grids = (None if call is None else call.arguments.get(n) for n in ("image_token_pooling", "image_grids"))
    if pooling is None or grids is None:
        return None
    tokens = (grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]).cpu()
    ends = torch.stack([patches.max() + 1 for patches in pooling.cpu().split(tokens.tolist())])
    crops = torch.diff(ends // features.shape[1:-1].numel(), prepend=ends.new_zeros(1))
    return ImageLayout(crops, flat=False, outputs=ImageLayout(tokens, flat=True))


def _by_token(call: ImageCall | None, features: Tensor, projector: nn.Module | None) -> ImageLayout | None:
    """Runs of placeholder tokens: of flat patches where nothing else tells, and of tiles that make up an image.

    InternVL puts all tiles of an image into one run, Idefics3 markers in between.
    """
    flat = features.dim() <= 2
    lengths = _tokens_of_images(call) if flat or _tiles(call) is not None else None
    if lengths is None or int((lengths * len(features) // lengths.sum()).sum()) != len(features):
        return None
    return ImageLayout(lengths, flat)


def _tiles(call: ImageCall | None) -> Tiles | None:
    """How tiles or frames stand in the prompt of the model that runs."""
    row = exceptional(current_model_call()[0])
    return row.frames if call is not None and call.modality == "video" and row.frames is not None else row.tiles


def _tokens_of_images(call: ImageCall | None) -> Tensor | None:
    """How many placeholder tokens each image has, `(images,)`, int64; `None` if no token ids tell."""
    model, arguments = current_model_call()
    ids = _new_ids(arguments)
    if model is None or ids is None:
        return None
    rows, tokens = ids.tolist(), _placeholders(model, "image" if call is None else call.modality)
    token = next((one for one in tokens if any(one in row for row in rows)), None)
    if token is None:
        return None
    end = next((getattr(model.config, name) for name in _ENDS if getattr(model.config, name, None) is not None), None)
    runs = [run for row in rows for run in image_runs(row, token, _tiles(call) or Tiles(0), end)]
    return torch.tensor(runs, dtype=torch.int64)


# A row for each way, of which the first that fits counts.
LAYOUTS: tuple[Callable[[ImageCall | None, Tensor, nn.Module | None], ImageLayout | None], ...] = (
    _by_call,
    _by_grid,
    _by_slice,
    _by_place,
    _by_resolution,
    _by_size,
    _by_view,
    _by_frames,
    _by_aspect,
    _by_sight,
    _by_pooling,
    _by_token,
)


# The setting that names the token after an image.
_ENDS = ("eoi_token_id", "eoi_token_index", "image_end_token_id")


def image_runs(ids: list[int], token: int, tiles: Tiles, end: int | None = None) -> list[int]:
    """How many placeholder tokens each image of a row of token ids has.

    Args:
        ids (`list[int]`): The row.
        token (`int`): Stands for images.
        tiles ([`Tiles`]): How those of one image stand in the row.
        end (`int`, *optional*): Stands behind every image.

    Returns:
        `list[int]`: In the order of the images.
    """
    images: list[list[int]] = []  # the lengths of runs
    opener, since = None, -1  # what stands before the first image; where the last run ended
    for place, one in enumerate(ids):
        if one != token:
            continue
        between = ids[since + 1 : place]
        if images and not between:
            images[-1][-1] += 1
        elif images and len(between) <= tiles.gap and _is_inside_image(between, end, opener):
            images[-1].append(1)
        else:
            images.append([1])
            opener = between[-1] if tiles.own_opener and len(images) == 1 and between else opener
        since = place
    return [sum(part) for runs in images for part in _cut_by_number(runs, tiles.number)]


def _cut_by_number(runs: list[int], number: int | None) -> list[list[int]]:
    """Tiles of images that are cut into a number of them; if they are no multiple of it, each is an image."""
    if number is None:
        return [runs]
    size = number if len(runs) % number == 0 else 1
    return [runs[i : i + size] for i in range(0, len(runs), size)]


def _is_inside_image(between: list[int], end: int | None, opener: int | None) -> bool:
    """Whether tokens stand between two tiles of one image, and not between two images.

    Idefics3 opens a tile by a fence and a marker, and closes an image by a fence, so that between two images there
    are two fences.
    """
    return end not in between and between[-1] != opener and between.count(between[-2] if len(between) > 1 else -1) < 2


def _new_ids(arguments: Any) -> Tensor | None:
    """The token ids of a call, without those whose keys and values are cached; `None` if it has embeddings only."""
    ids = next((arguments[name] for name in ("input_ids", "inputs") if arguments.get(name) is not None), None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return None
    cache = arguments.get("past_key_values")
    read = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    return ids[:, read:] if ids.shape[1] > read else ids


def _placeholders(model: nn.Module, modality: str) -> list[int]:
    """The tokens that may stand for images, or videos: some families use one token, or one method, for both."""
    config, kinds = getattr(model, "config", None), (modality, "image", "video")
    tokens = (getattr(config, f"{kind}_token_{end}", None) for kind in kinds for end in ("id", "index"))
    return [int(token) for token in tokens if token is not None]


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
