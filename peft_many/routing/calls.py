"""The calls that run in this thread: `forward`, `generate` and the image methods of watched models, as a stack."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..families.projector_call import ProjectorCall, features_of
from .noted import ImageMethod, Noted
from .row_weights import cached_length, remember, remembered
from .watched import arguments_of, watch_replica


def _holds(model: nn.Module | None, part: nn.Module | None) -> bool:
    """Whether a module is a model or a part of it."""
    return model is not None and any(module is part for module in model.modules())


@dataclass(eq=False)
class Call:
    """A running call of a model.

    Nothing that it leads to leads back to it, so that images are not kept longer than their calls. Models are known
    weakly: a call that Ctrl-C interrupted, which runs no hook, is only forgotten by the next one.
    """

    kind: str  # the method: "forward", "generate", which runs `forward` of the same module, or "images"
    owner_ref: weakref.ref[nn.Module]  # the module that was called
    arguments: Mapping[str, Any]  # by name
    outer: Call | None  # the call that it was made in
    noted: Noted | None = None  # of a call that is its own `of_batch`: what was noted of its images

    def __post_init__(self) -> None:
        outer = self.outer
        is_part = outer is not None and _holds(outer.owner, self.owner)
        self.around = outer if is_part else None  # the call that this one is a part of; calls of other models are none

    @property
    def owner(self) -> nn.Module | None:
        """The module that was called; it is there while the call runs."""
        return self.owner_ref()

    @property
    def lineage(self) -> Iterator[Call]:
        """This call and those that it is a part of, the innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.around

    @property
    def images(self) -> ImageCall | None:
        """The innermost image method among these."""
        return next((call for call in self.lineage if isinstance(call, ImageCall)), None)

    @property
    def of_model(self) -> Call | None:
        """The innermost `forward` or `generate`, whose arguments may hold token ids."""
        return next((call for call in self.lineage if not isinstance(call, ImageCall)), None)

    @property
    def of_batch(self) -> Call | None:
        """The outermost `forward`, whose batch the layers see; while `generate` prepares the first one, `generate`."""
        found: Call | None = None
        for call in self.lineage:
            if call.kind == "generate":
                return found or call
            found = call if call.kind == "forward" else found
        return found

    def is_over(self, inner: Call) -> bool:
        """Whether this is a `forward` that was interrupted, as another call cannot have been made in it.

        No model calls itself or what it is a part of. Of other models it cannot be told; theirs stay until they are
        called again, and stand in nobody's way.
        """
        if self.kind != "forward":
            return False
        if inner.around is not None:  # which is of the same model, or of a part of it
            return self.owner is inner.owner
        return self.owner is None or _holds(inner.owner, self.owner)

    @property
    def generation(self) -> Call | None:
        """The `generate` of the same module that this `forward` is a step of."""
        outer = self.outer
        return outer if outer is not None and outer.kind == "generate" and outer.owner is self.owner else None


@dataclass(eq=False)
class ImageCall(Call):
    """A running `get_image_features` or `get_video_features`."""

    told: ImageMethod = field(default_factory=ImageMethod)
    encoded: Tensor | None = None  # what the vision tower gave, of families that route by it
    decided: dict[nn.Module, Tensor] = field(default_factory=dict)  # at a projector, when it was called first


# A context variable, so that threads that share one model do not see each other's calls.
running: ContextVar[Call | None] = ContextVar("peft_many_running_call", default=None)


class _AskedFor(threading.local):
    """What compiled layers asked for in the running call, so that those that follow need not."""

    def __init__(self) -> None:
        self.gates: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}


asked_for = _AskedFor()


def run_on(call: Call | None) -> Call | None:
    """Go on with a call in this thread; what was running so far."""
    before = running.get()
    running.set(call)
    asked_for.gates.clear()
    return before


def current_image_call() -> ImageCall | None:
    """The image method that is running in this thread."""
    call = running.get()
    return None if call is None else call.images


@torch.compiler.disable  # type: ignore[untyped-decorator]
def begin_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A module's `forward` begins. Those that were interrupted (Ctrl-C, which runs no hook) are forgotten."""
    watch_replica(module)
    arguments = arguments_of(module.forward, args, kwargs)
    call = Call("forward", weakref.ref(module), arguments, running.get())
    while call.outer is not None and call.outer.is_over(call):
        call = Call("forward", call.owner_ref, arguments, call.outer.outer)
    if call.of_batch is call:
        # In `generate` the images are encoded before the first forward pass, in rows without beams.
        of_generation = call.generation.noted if call.generation is not None else None
        cache = arguments.get("past_key_values")
        is_asked = of_generation is None and not cached_length(cache)
        call.noted = Noted(module, arguments, remembered(cache) if of_generation is None else of_generation, is_asked)
    run_on(call)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def end_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A module's `forward` has ended. What is known of its rows is left where the next decoding step finds it."""
    call = running.get()
    while call is not None and call.kind == "forward" and call.owner is not module:
        call = call.outer
    if call is None or call.kind != "forward":
        return
    run_on(call.outer)
    if call.noted is None or output is None:  # a part of another call, or one that failed
        return
    known = call.noted.all_row_weights()
    if call.noted.any_images and call.generation is not None:
        call.generation.noted = Noted(module, call.generation.arguments, known)
    in_tuple = output if isinstance(output, tuple) else ()
    values = (getattr(output, "past_key_values", None), *in_tuple, call.arguments.get("past_key_values"))
    cache = next((value for value in values if isinstance(value, Cache)), None)
    if cache is not None:
        remember(cache, known)


def projector_call(projector: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ProjectorCall:
    """What is known of a projector's call that is running."""
    here, call = ProjectorCall(features_of(args, kwargs), projector, kwargs), running.get()
    if call is not None and call.of_model is not None:
        here = replace(here, model=call.of_model.owner, model_arguments=call.of_model.arguments)
    if call is not None and call.images is not None:
        images, *outer = (one for one in call.lineage if isinstance(one, ImageCall))
        here = replace(
            here,
            image_model=images.owner,
            image_arguments=images.arguments,
            outer_image_arguments=tuple(one.arguments for one in outer),
            modality=images.told.modality,
            is_further=projector in images.decided,
            tower_features=images.encoded,
        )
    return here
