"""Watching a model: its calls are noted in `peft_many.routing.calls` while they run."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.family import family_of
from ..families.parts import reads_images
from ..families.prompts import token_ids
from .calls import Call, ImageCall, begin_forward, current_image_call, end_forward, run_on, running
from .noted import ImageMethod, Noted
from .row_weights import cached_length, remembered
from .watched import WatchedMethod, arguments_of, unwatch, watch

IMAGE_METHODS = ("get_image_features", "get_video_features")
_HOOKS = "peft_many_hooks"


def watch_calls(model: nn.Module) -> list[nn.Module]:
    """Watch a model and every part of it that takes images; returns what was not watched before.

    Methods are set on the instances; the classes stay as they are.
    """
    return [module for module in model.modules() if _watch(module, is_model=module is model)]


def unwatch_calls(modules: Iterable[nn.Module]) -> None:
    """Leave modules as they were before they were watched."""
    for module in modules:
        unwatch(module)
        for handle in vars(module).pop(_HOOKS, ()):
            handle.remove()


@contextlib.contextmanager
def watching_calls(model: nn.Module) -> Iterator[None]:
    """Watch for the length of a `with` block; parts that are already watched stay so."""
    watched = watch_calls(model)
    try:
        yield
    finally:
        unwatch_calls(watched)


def _watch(module: Any, is_model: bool) -> bool:
    newly = [watch(module, name, _WatchedImages) for name in IMAGE_METHODS]
    if (is_model or (isinstance(module, PreTrainedModel) and reads_images(module))) and _HOOKS not in vars(module):
        newly.append(True)
        watch(module, "generate", _WatchedGenerate)
        # Plain functions that get the module, so that copies of a model watch themselves.
        hooks = [
            module.register_forward_pre_hook(begin_forward, with_kwargs=True),
            module.register_forward_hook(end_forward, always_call=True),
        ]
        if family_of(module).routes_by_tower and module.base_model is module:
            hooks.append(module.get_encoder(modality="image").register_forward_hook(_note_encoded))
        setattr(module, _HOOKS, tuple(hooks))
    return any(newly)


def _note_encoded(tower: nn.Module, args: Any, output: Any) -> None:
    call = current_image_call()
    if call is not None:
        call.encoded = output if isinstance(output, Tensor) else output[0]


class _WatchedGenerate(WatchedMethod):
    """Does what the model's own `generate` does, as one call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = arguments_of(self.own_method(), args, kwargs)
        cache = arguments.get("past_key_values")
        _keep_new_ids(arguments, cached_length(cache))
        ids = token_ids(arguments)
        goes_on = cached_length(cache) > 0 and ids is not None and ids.shape[1] == 1  # with its own last token
        noted = Noted(self.module, arguments, remembered(cache), has_instructions=not goes_on)
        before = run_on(Call("generate", weakref.ref(self.module), arguments, running.get(), noted))
        try:
            return self.own_method()(*args, **kwargs)
        finally:
            run_on(before)


def _keep_new_ids(arguments: dict[str, Any], read: int) -> None:
    """Of token ids that begin with those in the cache keep the new ones: their placeholders are the new images'."""
    ids, mask = token_ids(arguments), arguments.get("attention_mask")
    if read and ids is not None and ids.shape[1] > read and (mask is None or mask.shape[1] == ids.shape[1]):
        arguments["input_ids"] = ids[:, read:]  # a longer mask is of all of them, and the ids are all new


class _WatchedImages(WatchedMethod):
    """Does what an image method does, as a call."""

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outer = current_image_call()
        # Some families pass the frames of videos through `get_image_features`.
        is_video = "video" in self.name or (outer is not None and outer.told.modality == "video")
        arguments, told = arguments_of(self.own_method(), args, kwargs), ImageMethod("video" if is_video else "image")
        before = run_on(ImageCall("images", weakref.ref(self.module), arguments, running.get(), told=told))
        try:
            output = self.own_method()(*args, **kwargs)
        finally:
            run_on(before)
        told.tokens = _token_counts(output)
        return output


def _token_counts(output: Any) -> list[int] | None:
    """How many tokens each image has become, from what an image method returned; `None` if it is of another form."""
    features = getattr(output, "pooler_output", output)
    if isinstance(features, Tensor) and features.dim() == 3:
        return [features.shape[1]] * len(features)
    if isinstance(features, (list, tuple)) and all(isinstance(one, Tensor) for one in features):
        return [one.shape[:-1].numel() for one in features]
    return None
