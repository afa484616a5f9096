"""Videos for the families that take them: a row each, of frames of one colour."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .pixels import MERGE, PATCH, Arguments, patches_of, picture, setting
from .rows import Row
from .shrink import BOS, TEXT_TOKENS

FRAMES = 2


def takes_videos(model: Any) -> bool:
    """Whether a model has a method and an argument for videos."""
    arguments = inspect.signature(type(model).forward).parameters
    return _owner(model) is not None and "pixel_values_videos" in arguments


def video_inputs(model: Any, styles: list[int], row: Row) -> Arguments:
    """The arguments of a call with a video of each style, with tokens laid out as the row says."""
    features, layout = _features(model, styles), row.video
    with torch.no_grad():
        output = _owner(model).get_video_features(**_features(model, styles[:1]), return_dict=True).pooler_output
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


# Families whose videos are handed over in ways of their own, which are not made here.
NOT_MADE = (
    "gemma4",
    "gemma4_unified",
    "kimi_k25",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "molmo2",
    "nemotron_h_omni",
)

# All tokens in one run; text before each frame; and frames of image tokens between the tokens that bound a video.
_LAYOUTS: dict[str, Callable[[Any, list[int], list[int]], list[int]]] = {
    "one": lambda config, frame, further: [*frame * FRAMES, *further],
    "frames": lambda config, frame, further: [TEXT_TOKENS[9], *frame] * FRAMES,
    "bounded": lambda config, frame, further: [
        config.video_start_token_id,
        *[TEXT_TOKENS[9], *frame] * FRAMES,
        config.video_end_token_id,
    ],
}


def _features(model: Any, styles: list[int]) -> Arguments:
    videos = [[picture(style, 20 + frame) for frame in range(FRAMES)] for style in styles]
    if "video_grid_thw" not in inspect.signature(_owner(model).get_video_features).parameters:
        return {"pixel_values_videos": torch.stack([torch.stack(frames) for frames in videos])}
    patch = setting(model.config, ("patch_size",), PATCH)
    merge = setting(model.config, ("spatial_merge_size", "merge_size"), MERGE)
    together = setting(model.config, ("temporal_patch_size", "patch_temporal"), 1)
    patches = torch.cat([patches_of(frame, patch, merge, together) for frames in videos for frame in frames])
    grids = [[FRAMES, frames[0].shape[1] // patch, frames[0].shape[2] // patch] for frames in videos]
    inputs: Arguments = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor(grids)}
    if "video_merge_sizes" in inspect.signature(_owner(model).get_video_features).parameters:
        inputs["video_merge_sizes"] = torch.full((len(grids),), MERGE)
    return inputs


def _owner(model: Any) -> nn.Module | None:
    return next((part for part in (model.base_model, model) if hasattr(part, "get_video_features")), None)
