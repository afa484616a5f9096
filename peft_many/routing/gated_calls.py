"""From the images of a call to the LoRA layers that run in it, for merges with `gate_lora`.

A call is a running `forward` or `generate` of a gated model. The routed projector notes the task weights of its
images in the call; the LoRA layers that run in it ask for their gates. What was found lives on in the call's cache
object, for decoding steps and further turns, and dies with it.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from peft_many.families.calls import current_image_call

from ..families.image_layout import ImageLayout
from .image_calls import WATCHED_METHODS
from .row_weights import Gates, ImageWeights, RowWeights, repeats_of_rows, warn_of_merged
from .watched import WatchedMethod, unwatch, watch

# The attribute of a cache object that holds the task weights of its rows, by adapter. Copies of a cache take it along.
CACHE_ATTRIBUTE = "peft_many_row_weights"


@dataclass(frozen=True)
class GateTarget:
    """Whose LoRA layers a projector's routing gates.

    Args:
        adapter_name (`str`): The adapter.
        columns (`tuple[int, ...]`): The place of each routed task among the tasks of the merge.
        tasks (`int`): How many tasks were merged.
    """

    adapter_name: str
    columns: tuple[int, ...]
    tasks: int


@dataclass(eq=False)
class _Call:
    """A running `forward` or `generate`.

    Args:
        model (`torch.nn.Module`): Whose it is.
        arguments (`dict[str, Any]`): By name.
        outer (`_Call`, *optional*): The one that it runs in.
        is_forward (`bool`): Or `generate`.
        inherited (`dict[str, RowWeights]`): By adapter, from the images before this call.
        images (`dict[str, list[ImageWeights]]`): By adapter, those that were encoded in it.
    """

    model: nn.Module
    arguments: dict[str, Any]
    outer: _Call | None
    is_forward: bool
    inherited: dict[str, RowWeights]
    images: dict[str, list[ImageWeights]] = field(default_factory=dict)
    _known: dict[str, RowWeights | None] = field(default_factory=dict)

    def note(self, adapter_name: str, images: ImageWeights) -> None:
        noted = self.images.setdefault(adapter_name, [])
        if noted and noted[-1].call is images.call is not None:
            noted.pop()  # of several projectors the last one is nearest to the language model
        noted.append(images)
        self._known.pop(adapter_name, None)

    def row_weights(self, adapter_name: str) -> RowWeights | None:
        """The task weights of the batch's rows; `None` where no row had an image so far, or it cannot be told."""
        if adapter_name not in self._known:
            found = self.inherited.get(adapter_name)
            for images in self.images.get(adapter_name, []):
                rows = images.by_row(self.model, self.arguments)
                if rows is None:
                    found = None
                    break
                found = rows if found is None else rows.plus(found)
            self._known[adapter_name] = found
        return self._known[adapter_name]

    def all_row_weights(self) -> dict[str, RowWeights]:
        found = {name: self.row_weights(name) for name in (*self.inherited, *self.images)}
        return {name: weights for name, weights in found.items() if weights is not None}

    def hand_over(self, output: Any) -> None:
        """Leave what is known where the next decoding step finds it."""
        found = self.all_row_weights()
        if self.images and self.outer is not None and self.outer.model is self.model:
            self.outer.inherited, self.outer.images, self.outer._known = found, {}, {}
        in_tuple = output if isinstance(output, tuple) else ()
        values = (getattr(output, "past_key_values", None), *in_tuple, self.arguments.get("past_key_values"))
        cache = next((value for value in values if isinstance(value, Cache)), None)
        if cache is not None and (found or hasattr(cache, CACHE_ATTRIBUTE)):
            setattr(cache, CACHE_ATTRIBUTE, found)
            for name in _MOVES_ROWS:
                watch(cache, name, _RowsFollow)


# A context variable, so that threads that share one model do not see each other's calls.
_running: ContextVar[_Call | None] = ContextVar("peft_many_gated_call", default=None)


def note_images(target: GateTarget, weights: Tensor, layout: ImageLayout) -> None:
    """Note the routing weights of a projector's images in the running call.

    Args:
        target ([`GateTarget`]): For whom.
        weights (`torch.Tensor`): Shape `(images, routed tasks)`, float32.
        layout ([`ImageLayout`]): How the projector's input is shared out among the images.

    Raises:
        RuntimeError: The model trains with gradient checkpointing, which runs layers again when the call is over.
    """
    call = _running.get()
    if len(weights) == 0:
        return
    if call is None:
        warn_of_merged("images were encoded outside of the model's `forward` and `generate`")
        return
    if torch.is_grad_enabled() and call.model.training and getattr(call.model, "is_gradient_checkpointing", False):
        raise RuntimeError(
            f"The adapter '{target.adapter_name}' is a merge with `gate_lora`, which does not go with gradient "
            "checkpointing. Call `model.eval()` or `model.gradient_checkpointing_disable()`."
        )
    all_tasks = weights.new_zeros(len(weights), target.tasks)
    all_tasks[:, list(target.columns)] = weights
    start = _length(call.arguments.get("past_key_values"))
    call.note(target.adapter_name, ImageWeights(all_tasks, layout, current_image_call(), start))


def current_gates(adapter_name: str, ranks: tuple[int, ...], x: Tensor) -> Gates | None:
    """The gates of a layer in the running call; `None` where all rows get the merged delta.

    Args:
        adapter_name (`str`): The layer's adapter.
        ranks (`tuple[int, ...]`): `r_t` of each task in the layer.
        x (`torch.Tensor`): The layer's input, shape `(rows, …, in)` or `(rows · tokens, in)`.
    """
    call = _running.get()
    if call is None or current_image_call() is not None:  # what the vision tower sees are images, not rows
        return None
    weights = call.row_weights(adapter_name)
    if weights is None:
        return None
    repeats = repeats_of_rows(x, len(weights.images), call.arguments)
    return None if repeats is None else weights.gates(ranks, repeats, x)


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    outer = _running.get()
    if outer is not None and outer.is_forward:
        if outer.model is not module:
            return  # a part of the model whose call is running
        outer = outer.outer  # left behind by a call that was interrupted
    arguments = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs} if args else kwargs
    # In `generate` the images are encoded before the first forward pass, in rows without beams.
    inherited = outer.all_row_weights() if outer is not None and outer.model is module else {}
    inherited = inherited or _of_cache(arguments.get("past_key_values"))
    _running.set(_Call(module, arguments, outer, True, inherited))


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    call = _running.get()
    if call is not None and call.is_forward and call.model is module:
        _running.set(call.outer)
        if output is not None:  # else it failed
            call.hand_over(output)


def _of_cache(cache: Any) -> dict[str, RowWeights]:
    """What is known of the rows whose tokens a cache holds; nothing if it was cut back to before an image since."""
    found: dict[str, RowWeights] = getattr(cache, CACHE_ATTRIBUTE, {})
    return {name: rows for name, rows in found.items() if _length(cache) > rows.start}


def _length(cache: Any) -> int:
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0


# Public methods of caches that change which row is where.
_MOVES_ROWS = ("reorder_cache", "batch_select_indices")


class _RowsFollow(WatchedMethod):
    """Does what the cache's own method does, and to what is known of its rows too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        places: Tensor = next(iter((*args, *kwargs.values())))
        held = len(places) if self.name == "reorder_cache" else _rows_of(self.module)
        output = self.own_method()(*args, **kwargs)
        known: dict[str, RowWeights] = getattr(self.module, CACHE_ATTRIBUTE)
        # Where several beams are held for each row that is known, they change places among themselves.
        followed = {name: rows.taken(places) if len(rows.images) == held else rows for name, rows in known.items()}
        setattr(self.module, CACHE_ATTRIBUTE, followed)
        return output


def _rows_of(cache: Any) -> int | None:
    keys = (getattr(layer, "keys", None) for layer in getattr(cache, "layers", ()))
    return next((len(tensor) for tensor in keys if isinstance(tensor, Tensor)), None)


class _WatchedGenerate(WatchedMethod):
    """Does what the model's own `generate` does, as one call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**self.__signature__.bind_partial(*args).arguments, **kwargs}
        inherited = _of_cache(arguments.get("past_key_values"))
        if inherited:
            _drop_what_was_read(arguments)
        token = _running.set(_Call(self.module, arguments, _running.get(), False, inherited))
        try:
            return self.own_method()(*args, **kwargs)
        finally:
            _running.reset(token)


def _drop_what_was_read(arguments: dict[str, Any]) -> None:
    """Of token ids that begin with those in the cache keep the new ones: their placeholders are the new images'."""
    read = _length(arguments["past_key_values"])
    for name in ("input_ids", "inputs"):
        ids = arguments.get(name)
        if isinstance(ids, Tensor) and ids.shape[1] > read:
            mask = arguments.get("attention_mask")
            if mask is None or mask.shape[1] == ids.shape[1]:  # else they are all new
                arguments[name] = ids[:, read:]


def watch_gated_calls(model: nn.Module) -> None:
    """Let the model's LoRA layers know the images of the call that they run in; doing it again changes nothing."""
    module: Any
    takes_images = [m for m in model.modules() if any(callable(getattr(type(m), n, None)) for n in WATCHED_METHODS)]
    for module in dict.fromkeys([model, *takes_images]):
        if "gate_hooks" in vars(module):
            continue
        # Plain functions that get the module, so that copies of a model watch themselves.
        module.gate_hooks = (
            module.register_forward_pre_hook(_enter, with_kwargs=True),
            module.register_forward_hook(_leave, with_kwargs=True, always_call=True),
        )
        watch(module, "generate", _WatchedGenerate)


def unwatch_gated_calls(model: nn.Module) -> None:
    """Undo `watch_gated_calls`."""
    module: Any
    for module in model.modules():
        for handle in vars(module).pop("gate_hooks", ()):
            handle.remove()
        unwatch(module, "generate", _WatchedGenerate)
