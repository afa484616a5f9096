"""Watching a model encode images: what it was called with, and what `get_image_features` was.

A projector sees vision features without image boundaries. Those stand in the arguments of the model's public
`get_image_features` (`get_video_features`), which `forward` and `generate` both go through, or in the token ids that
`forward` and `generate` get.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .exceptions import exceptional
from .families import takes_images
from .watched import WatchedMethod, unwatch, watch, watch_replica

WATCHED_METHODS = ("get_image_features", "get_video_features")
_HOOKS = "image_hooks"


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
_image_call: ContextVar[ImageCall | None] = ContextVar("peft_many_image_call", default=None)
_model_calls: ContextVar[tuple[ModelCall, ...]] = ContextVar("peft_many_calls", default=())


def current_image_call() -> ImageCall | None:
    """The image call that is running in this thread."""
    return _image_call.get()


def current_model_call() -> tuple[nn.Module | None, Mapping[str, Any]]:
    """The `forward` or `generate` that is running in this thread: whose, and its arguments by name."""
    calls = _model_calls.get()
    return (calls[-1].owner, calls[-1].arguments) if calls else (None, {})


class _WatchedImages(WatchedMethod):
    """Lets others know the arguments of an image method while it runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.__signature__.bind(*args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        outer = _image_call.get()
        # Some families pass the frames of videos through `get_image_features`.
        videos = "video" in self.name or (outer is not None and outer.modality == "video")
        call = ImageCall(self.module, arguments, "video" if videos else "image", outer)
        token = _image_call.set(call)
        try:
            output = self.own_method()(*args, **kwargs)
        finally:
            _image_call.reset(token)
        call.tokens = _token_counts(output)
        return output


class _WatchedGenerate(WatchedMethod):
    """Lets others know the arguments of `generate` while it runs: images are encoded before its first forward pass."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**self.__signature__.bind_partial(*args).arguments, **kwargs}
        token = _model_calls.set((*_model_calls.get(), ModelCall(self.module, arguments, is_forward=False)))
        try:
            return self.own_method()(*args, **kwargs)
        finally:
            _model_calls.reset(token)


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    watch_replica(module)
    arguments = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs} if args else kwargs
    calls = _model_calls.get()
    while calls and not calls[-1].may_run(module):  # left behind by one that was interrupted (Ctrl-C)
        calls = calls[:-1]
    _model_calls.set((*calls, ModelCall(module, arguments, is_forward=True)))


def _leave(module: nn.Module, *_: Any) -> None:
    calls = _model_calls.get()
    while calls and calls[-1].owner is not module:
        calls = calls[:-1]
    _model_calls.set(calls[:-1])


def _note_encoded(tower: nn.Module, args: Any, output: Any) -> None:
    call = _image_call.get()
    if call is not None:
        call.encoded = output if isinstance(output, Tensor) else output[0]


def _token_counts(output: Any) -> list[int] | None:
    """How many tokens each image has become, from what an image method returned; `None` if it is of another form."""
    features = getattr(output, "pooler_output", output)
    if isinstance(features, Tensor) and features.dim() == 3:
        return [features.shape[1]] * len(features)
    if isinstance(features, (list, tuple)) and all(isinstance(one, Tensor) for one in features):
        return [one.shape[:-1].numel() for one in features]
    return None


def watch_image_calls(model: nn.Module) -> list[nn.Module]:
    """Watch every part of the model that takes images; returns what was newly watched.

    Methods are set on the instances; the classes stay as they are.
    """
    watched = []
    module: Any
    for module in model.modules():
        newly = [watch(module, name, _WatchedImages) for name in WATCHED_METHODS]
        if takes_images(module):
            newly.append(watch(module, "generate", _WatchedGenerate))
            newly.append(_hook(module))
        if any(newly):
            watched.append(module)
    return watched


def _hook(module: Any) -> bool:
    if _HOOKS in vars(module):
        return False
    # Plain functions that get the module, so that copies of a model watch themselves.
    hooks = [
        module.register_forward_pre_hook(_enter, with_kwargs=True),
        module.register_forward_hook(_leave, always_call=True),
    ]
    if exceptional(module).pools_encoder and module.base_model is module:
        hooks.append(module.get_encoder(modality="image").register_forward_hook(_note_encoded))
    setattr(module, _HOOKS, tuple(hooks))
    return True


def unwatch_image_calls(watched: list[nn.Module]) -> None:
    """Give the modules their own methods back."""
    for module in watched:
        for name in WATCHED_METHODS:
            unwatch(module, name, _WatchedImages)
        unwatch(module, "generate", _WatchedGenerate)
        for handle in vars(module).pop(_HOOKS, ()):
            handle.remove()


@contextlib.contextmanager
def watching_image_calls(model: nn.Module) -> Iterator[None]:
    """Watch for the length of a `with` block; parts that are already watched stay so."""
    watched = watch_image_calls(model)
    try:
        yield
    finally:
        unwatch_image_calls(watched)
