"""Watching a model encode images: its calls are noted in `peft_many.families.calls` while they run."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..families.calls import ImageCall, ModelCall, image_call, model_calls
from ..families.parts import takes_images
from ..families.rows import exceptional
from .watched import WatchedMethod, unwatch, watch, watch_replica

WATCHED_METHODS = ("get_image_features", "get_video_features")
_HOOKS = "image_hooks"


class _WatchedImages(WatchedMethod):
    """Lets others know the arguments of an image method while it runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.__signature__.bind(*args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        outer = image_call.get()
        # Some families pass the frames of videos through `get_image_features`.
        videos = "video" in self.name or (outer is not None and outer.modality == "video")
        call = ImageCall(self.module, arguments, "video" if videos else "image", outer)
        token = image_call.set(call)
        try:
            output = self.own_method()(*args, **kwargs)
        finally:
            image_call.reset(token)
        call.tokens = _token_counts(output)
        return output


class _WatchedGenerate(WatchedMethod):
    """Lets others know the arguments of `generate` while it runs: images are encoded before its first forward pass."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**self.__signature__.bind_partial(*args).arguments, **kwargs}
        token = model_calls.set((*model_calls.get(), ModelCall(self.module, arguments, is_forward=False)))
        try:
            return self.own_method()(*args, **kwargs)
        finally:
            model_calls.reset(token)


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    watch_replica(module)
    arguments = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs} if args else kwargs
    calls = model_calls.get()
    while calls and not calls[-1].may_run(module):  # left behind by one that was interrupted (Ctrl-C)
        calls = calls[:-1]
    model_calls.set((*calls, ModelCall(module, arguments, is_forward=True)))


def _leave(module: nn.Module, *_: Any) -> None:
    calls = model_calls.get()
    while calls and calls[-1].owner is not module:
        calls = calls[:-1]
    model_calls.set(calls[:-1])


def _note_encoded(tower: nn.Module, args: Any, output: Any) -> None:
    call = image_call.get()
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
