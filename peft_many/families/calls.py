"""The calls that are running in this thread, as far as they tell which images a model was called with.

A projector sees vision features without image boundaries. Those stand in the arguments of the model's public
`get_image_features` (`get_video_features`), which `forward` and `generate` both go through, or in the token ids that
`forward` and `generate` get. `peft_many.routing` notes the calls here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(eq=False)
class ImageCall:
    """One call of `get_image_features` or `get_video_features`.

    Args:
        owner (`torch.nn.Module`): The module it belongs to.
        arguments (`dict[str, Any]`): By name.
        modality (`str`): `"image"` or `"video"`.
        outer (`ImageCall`, *optional*): The one that it runs in.
        tokens (`list[int]`, *optional*): Once it has returned, how many tokens each image has become, if it says so.
        encoded (`torch.Tensor`, *optional*):
            What the vision tower gave, of families whose projectors read something else (a Q-Former's queries).
        decided (`dict[nn.Module, torch.Tensor]`): What was decided at a projector when it was called first.
    """

    owner: nn.Module
    arguments: dict[str, Any]
    modality: str
    outer: ImageCall | None = None
    tokens: list[int] | None = None
    encoded: Tensor | None = None
    decided: dict[nn.Module, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One call of `forward` or `generate`.

    Args:
        owner (`torch.nn.Module`): The module it belongs to.
        arguments (`Mapping[str, Any]`): By name.
        is_forward (`bool`): Or else `generate`, which runs `forward` of the same module.
    """

    owner: nn.Module
    arguments: Mapping[str, Any]
    is_forward: bool

    def may_run(self, module: nn.Module) -> bool:
        """Whether a `forward` of the module can be a part of this call."""
        if self.owner is module:
            return not self.is_forward
        return any(part is module for part in self.owner.modules())


# Context variables, so that threads that share one model do not see each other's images.
image_call: ContextVar[ImageCall | None] = ContextVar("peft_many_image_call", default=None)
model_calls: ContextVar[tuple[ModelCall, ...]] = ContextVar("peft_many_calls", default=())


def current_image_call() -> ImageCall | None:
    """The image call that is running in this thread."""
    return image_call.get()


def current_model_call() -> tuple[nn.Module | None, Mapping[str, Any]]:
    """The `forward` or `generate` that is running in this thread: whose, and its arguments by name."""
    calls = model_calls.get()
    return (calls[-1].owner, calls[-1].arguments) if calls else (None, {})
