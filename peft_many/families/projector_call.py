"""A projector is called: what it gets, and the calls that it runs in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(eq=False)
class ProjectorCall:
    """A running call of a projector, which gets vision features without image boundaries.

    These stand in the arguments of the model's `get_image_features` (`get_video_features`), which `forward` and
    `generate` go through in most families, or in the token ids that `forward` and `generate` get.

    Args:
        features (`torch.Tensor`): The projector's input.
        projector (`torch.nn.Module`, *optional*): The projector.
        arguments (`Mapping[str, Any]`): Its further arguments that were given by name.
        model (`torch.nn.Module`, *optional*): Whose `forward` or `generate` is running, the innermost one.
        model_arguments (`Mapping[str, Any]`): The arguments of that, by name.
        image_model (`torch.nn.Module`, *optional*): Whose `get_image_features` or `get_video_features` is running.
        image_arguments (`Mapping[str, Any]`): The arguments of that, by name.
        outer_image_arguments (`tuple[Mapping[str, Any], ...]`):
            Those of image methods that this one runs in: some families hand over the frames of a video to
            `get_image_features`. The nearest first.
        modality (`str`): `"image"` or `"video"`.
        is_further (`bool`): Whether the projector has been called before while this image method runs.
        tower_features (`torch.Tensor`, *optional*):
            What the vision tower gave, of families that say `routes_by_tower`.
    """

    features: Tensor
    projector: nn.Module | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    image_model: nn.Module | None = None
    image_arguments: Mapping[str, Any] = field(default_factory=dict)
    outer_image_arguments: tuple[Mapping[str, Any], ...] = ()
    modality: str = "image"
    is_further: bool = False
    tower_features: Tensor | None = None

    @property
    def vision_features(self) -> Tensor:
        """What the router compares images by."""
        return self.features if self.tower_features is None else self.tower_features


def features_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """A layer's or projector's input: the first argument, by position or by name."""
    features: Tensor = args[0] if args else next(iter(kwargs.values()))
    return features
