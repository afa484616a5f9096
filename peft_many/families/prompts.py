"""How many placeholder tokens each image has in a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .family import Tiles

# What stands for a whole image in the token ids of LLaVA's own code.
PICTURE_INDEX = -200
# The setting that names the token after an image.
_ENDS = ("eoi_token_id", "eoi_token_index", "image_end_token_id")


def token_ids(arguments: Mapping[str, Any]) -> Tensor | None:
    """The token ids among a model's arguments, shape `(rows, length)`; `None` if it has embeddings only."""
    ids = next((arguments[name] for name in ("input_ids", "inputs") if arguments.get(name) is not None), None)
    return ids if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() else None


def placeholder_tokens(model: Any, modality: str) -> list[int]:
    """The tokens that may stand for images, or videos: some families use one token, or one method, for both."""
    kinds, config = (modality, "image", "video"), getattr(model, "config", None)
    tokens = [getattr(config, f"{kind}_token_{end}", None) for kind in kinds for end in ("id", "index")]
    tokens.append(getattr(model, "img_context_token_id", None))  # InternVLChat's own code sets it on the model
    return [int(token) for token in tokens if token is not None]


def tokens_of_images(ids: Tensor | None, model: Any, modality: str, tiles: Tiles) -> Tensor | None:
    """How many placeholder tokens each image of a batch has, `(images,)`, int64; `None` if there are none.

    The model or its config names these tokens. In the batch's token ids, `(rows, length)`, images stand in order.
    """
    rows = [] if ids is None else ids.tolist()
    token = next((one for one in placeholder_tokens(model, modality) if any(one in row for row in rows)), None)
    if token is None:
        return None
    config = getattr(model, "config", None)
    end = next((getattr(config, name) for name in _ENDS if getattr(config, name, None) is not None), None)
    return torch.tensor([length for row in rows for length in image_runs(row, token, tiles, end)])


def image_runs(ids: list[int], token: int, tiles: Tiles, end: int | None = None) -> list[int]:
    """How many times each image's placeholder `token` stands in a row of token ids; `end` is behind every image."""
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
