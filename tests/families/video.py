"""Videos for the families that take them: a row each, of frames of one colour."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .pixels import MERGE, PATCH, Arguments, Picture, packed, patches_of, picture, placed_patches, pooled, setting
from .prompts import END, START
from .rows import Row
from .shrink import BOS, TEXT_TOKENS

FRAMES = 2
Videos = list[list[Picture]]


def takes_videos(model: Any) -> bool:
    """Whether a model has an argument for videos."""
    return "pixel_values_videos" in inspect.signature(type(model).forward).parameters


def video_inputs(model: Any, styles: list[int], row: Row) -> Arguments:
    """The arguments of a call with a video of each style, with tokens laid out as the row says."""
    features, layout = _features(model, styles, row), row.video
    one = _features(model, styles[:1], row)
    if not hasattr(_owner(model), "get_video_features"):
        one = {"pixel_values": one["pixel_values_videos"]}
    with torch.no_grad():
        output = _method(model)(**one, return_dict=True).pooler_output
    parts = output if isinstance(output, (list, tuple)) else [output]
    frame, further = divmod(sum(part.shape[:-1].numel() for part in parts), FRAMES)
    names = ("video_token_id", "video_token_index", "image_token_id", "image_token_index")[2 * (layout == "bounded") :]
    token = int(next(value for name in names if (value := getattr(model.config, name, None)) is not None))
    ids = [BOS, *_LAYOUTS[layout](model.config, [token] * frame, [token] * further), *TEXT_TOKENS[:4]]
    batch = torch.tensor([ids] * len(styles))
    inputs: Arguments = {"input_ids": batch, "attention_mask": torch.ones_like(batch), **features}
    if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
        inputs["mm_token_type_ids"] = (batch == token).long() * 2
    return inputs


# All tokens in one run; text before each frame; brackets around each; and frames of image tokens between the tokens
# that bound a video.
_LAYOUTS: dict[str, Callable[[Any, list[int], list[int]], list[int]]] = {
    "one": lambda config, frame, further: [*frame * FRAMES, *further],
    "frames": lambda config, frame, further: [TEXT_TOKENS[9], *frame] * FRAMES,
    "bracketed": lambda config, frame, further: [START, *frame, END] * FRAMES,
    "bounded": lambda config, frame, further: [
        config.video_start_token_id,
        *[TEXT_TOKENS[9], *frame] * FRAMES,
        config.video_end_token_id,
    ],
}


def _features(model: Any, styles: list[int], row: Row) -> Arguments:
    videos = [[picture(style, 20 + frame) for frame in range(FRAMES)] for style in styles]
    arguments = inspect.signature(_method(model)).parameters
    way = next((way for name, way in _WAYS.items() if name in arguments), _stacked)
    inputs = way(model, videos)
    if row.inputs == "patch_images":
        patches = inputs["pixel_values_videos"]
        inputs["pixel_values_videos"] = patches.reshape(len(patches), 3, PATCH, PATCH)
    return inputs


def _stacked(model: Any, videos: Videos) -> Arguments:
    """`(videos, frames, 3, height, width)`, or, of a tower with patches of several frames, all frames in a row."""
    frames = torch.stack([torch.stack(video) for video in videos])
    in_a_row = hasattr(model.config, "video_temporal_patch_size")
    return {"pixel_values_videos": frames.flatten(0, 1) if in_a_row else frames}


def _gridded(model: Any, videos: Videos) -> Arguments:
    """Qwen-VL: flat patches and `(videos, 3)` grids."""
    patch = setting(model.config, ("patch_size",), PATCH)
    merge = setting(model.config, ("spatial_merge_size", "merge_size"), MERGE)
    together = setting(model.config, ("temporal_patch_size", "patch_temporal"), 1)
    patches = torch.cat([patches_of(frame, patch, merge, together) for frames in videos for frame in frames])
    grids = [[FRAMES, frames[0].shape[1] // patch, frames[0].shape[2] // patch] for frames in videos]
    inputs: Arguments = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor(grids)}
    if "video_merge_sizes" in inspect.signature(_method(model)).parameters:
        inputs["video_merge_sizes"] = torch.full((len(grids),), MERGE)
    return inputs


def _placed(model: Any, videos: Videos) -> Arguments:
    """Gemma 4: the patches of all frames and their places, and how many frames each video has."""
    inputs = placed_patches(model.config, videos)
    return {
        "pixel_values_videos": inputs["pixel_values"],
        "video_position_ids": inputs["image_position_ids"],
        "num_frames_per_video": torch.tensor([len(frames) for frames in videos]),
    }


def _packed(model: Any, videos: Videos) -> Arguments:
    """MiniCPM-V: one wide picture of all frames."""
    inputs = packed(model.config, videos)
    return {"pixel_values_videos": inputs["pixel_values"], "target_sizes_videos": inputs["target_sizes"]}


def _pooled(model: Any, videos: Videos) -> Arguments:
    """Molmo 2: the patches of all frames, for each token those that make it up, and `(videos, 3)` grids of tokens."""
    inputs = pooled(model.config, videos)
    side = int(inputs["image_grids"][0, 0])
    return {
        "pixel_values_videos": inputs["pixel_values"],
        "video_token_pooling": inputs["image_token_pooling"],
        "video_grids": torch.tensor([[len(frames), side, side] for frames in videos]),
    }


# By an argument of the model's `get_video_features`.
_WAYS: dict[str, Callable[[Any, Videos], Arguments]] = {
    "video_grid_thw": _gridded,
    "num_frames_per_video": _placed,
    "target_sizes_videos": _packed,
    "video_token_pooling": _pooled,
}


def _owner(model: Any) -> nn.Module:
    names = ("get_video_features", "get_image_features")
    return next(part for name in names for part in (model.base_model, model) if hasattr(part, name))


def _method(model: Any) -> Callable[..., Any]:
    """What turns videos into features: of some families the same as for images."""
    owner: Any = _owner(model)
    method: Callable[..., Any] = getattr(owner, "get_video_features", None) or owner.get_image_features
    return method
