"""Inputs for a tiny model of any family: what its processor would make of pictures, told by the model's own arguments.

Rows hold pictures and text. Text fills the rows up to one length, so that no padding is needed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .pixels import KINDS, Arguments, Picture, tiles_in_prompt, vision_settings
from .prompts import END, PROMPTS
from .rows import Row
from .shrink import BOS, TEXT_TOKENS

UNNAMED = 110  # stands for images where the configuration names no token


def kind_of(model: nn.Module) -> str:
    """How the model takes images, by the arguments of its own `get_image_features`."""
    owner = next((part for part in (model.base_model, model) if hasattr(part, "get_image_features")), None)
    names = set(inspect.signature(owner.get_image_features).parameters) if owner is not None else set()
    config: Any = model.config
    if "image_grid_thw" in names:
        return "grid"
    if "image_sizes" in names:
        return "high_resolution" if getattr(config, "image_grid_pinpoints", None) else "sizes"
    if "pixel_attention_mask" in names:
        return "batch"
    return "stacked"


def image_token(config: Any) -> int:
    """The token that stands for images."""
    names = ("image_token_id", "image_token_index", "image_patch_id", "video_token_id")
    found = (getattr(part, name, None) for part in (config, vision_settings(config)) for name in names)
    return next((int(token) for token in found if token is not None), UNNAMED)


class Inputs:
    """Makes inputs for one model.

    Args:
        model (`PreTrainedModel`): The base model.
        row ([`Row`]): What is special about its family.
    """

    def __init__(self, model: Any, row: Row) -> None:
        self.config = model.config
        self.kind = row.inputs or kind_of(model)
        self.prompt = row.prompt
        self.token = image_token(model.config)
        self._end = getattr(model.config, "eoi_token_index", None) or END
        self._arguments = set(inspect.signature(type(model).forward).parameters)
        self._owner = next((part for part in (model.base_model, model) if hasattr(part, "get_image_features")), None)
        self._tokens, self._axes = row.tokens, row.position_axes
        self._counts: dict[torch.Size, int] = {}

    def tokens_of(self, image: Picture) -> int:
        """How many tokens the picture becomes."""
        if self._tokens is not None:
            return self._tokens
        if image.shape not in self._counts:
            with torch.no_grad():
                output = self._owner.get_image_features(
                    **KINDS[self.kind][0](self.config, [[image]]), return_dict=True
                )
            features = output.pooler_output
            if features is None:  # several of a kind, one for each of some layers of the language model
                features = output.deepstack_features[0][1] if "deepstack_features" in output else output[0]
            parts = features if isinstance(features, (list, tuple)) else [features]
            self._counts[image.shape] = sum(part.shape[:-1].numel() for part in parts)
        return self._counts[image.shape]

    def __call__(self, rows: list[list[Picture]], length: int | None = None) -> Arguments:
        """The arguments of a joint call for rows of pictures."""
        ids = [self.row(images) for images in rows]
        length = max(map(len, ids)) if length is None else length
        filled = [row + [TEXT_TOKENS[(7 * i + 3) % len(TEXT_TOKENS)] for i in range(length - len(row))] for row in ids]
        inputs: Arguments = {"input_ids": torch.tensor(filled)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        is_image = (inputs["input_ids"] == self.token).long()
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in self._arguments:
                inputs[name] = is_image
        if self._axes is not None:
            inputs["position_ids"] = torch.arange(length).expand(self._axes, len(rows), -1)
        if "image_embeds_position_mask" in self._arguments:
            inputs["image_embeds_position_mask"] = is_image
        if "cross_attention_mask" in self._arguments and any(rows):
            inputs["cross_attention_mask"] = self._seen_images(rows, is_image)
        if "image_attention_mask" in self._arguments:
            inputs["image_attention_mask"] = (is_image.cumsum(1) > 0).long()[..., None]
        if getattr(self.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"][:, -3:]
        if any(rows):
            inputs |= KINDS[self.kind][0](self.config, rows)
        return inputs

    def _seen_images(self, rows: list[list[Picture]], is_image: Tensor) -> Tensor:
        """Mllama: which images and tiles each token attends to, `(rows, length, images, tiles)`: those before it."""
        aspects = KINDS[self.kind][0](self.config, rows)
        begun = is_image.cumsum(1)[..., None] > torch.arange(aspects["aspect_ratio_ids"].shape[1])
        real = aspects["aspect_ratio_mask"] * (aspects["aspect_ratio_ids"] > 0)[..., None]
        return (begun[..., None] * real[:, None]).long()

    def row(self, images: list[Picture]) -> list[int]:
        """The token ids of one row, without what fills it up."""
        ids = [BOS]
        for image in images:
            tiles = tiles_in_prompt(self.kind, image)
            tile = [self.token] * (self.tokens_of(image) // tiles)
            ids += PROMPTS[self.prompt]([tile] * tiles, self._end)
        return [*ids, *(TEXT_TOKENS[(11 * len(images) + 5 * i + 1) % len(TEXT_TOKENS)] for i in range(3))]
