"""From the images of a call to the rows of its batch: which task's LoRA each row gets, for `gate_lora`.

A call is a running `forward` or `generate` of a gated model. The routed projector notes the task weights of its
images in the call; the LoRA layers that run in it ask for their gates. What was found lives on in the call's cache
object, for the decoding steps, and dies with it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils import PeftWarning
from torch import Tensor, nn
from transformers import Cache

from ..algebra.gating import confidence, gates, rows_of_images
from .image_layout import WATCHED_METHODS, ImageCall, ImageLayout, current_image_call

# The attribute of a cache object that holds the task weights of its rows. Copies of a cache take it along.
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


@dataclass(frozen=True)
class Gates:
    """What multiplies a layer's merged and own rows, by row of the batch; `None` stands for zeros in every row."""

    merged: Tensor | None
    own: Tensor | None


class RowWeights:
    """The task weights of a batch's rows: the sum over each row's images, and their number."""

    def __init__(self, sums: Tensor, images: Tensor) -> None:
        self.sums = sums
        self.images = images
        self._gates: dict[tuple[Any, ...], Gates] = {}

    def plus(self, other: RowWeights | None) -> RowWeights:
        """With more images; if it has several rows to one of the other's, as with beams, these share them."""
        if other is None:
            return self
        one, two = (self, other) if len(self.images) >= len(other.images) else (other, self)
        repeats = len(one.images) // len(two.images)
        sums, images = (part.repeat_interleave(repeats, dim=0) for part in (two.sums, two.images))
        return RowWeights(one.sums + sums.to(one.sums.device), one.images + images.to(one.images.device))

    def gates(self, ranks: tuple[int, ...], repeats: int, device: torch.device, dtype: torch.dtype) -> Gates | None:
        """The gates of a layer with `r_t` of `ranks`, each row's `repeats` times; `None` if every row's is closed."""
        key = (ranks, repeats, device, dtype)
        if not self._has_open:
            return None
        if key not in self._gates:
            weights, trust = self._weights.to(device), self._trust.to(device)
            merged, own = (part.to(dtype).repeat_interleave(repeats, dim=0) for part in gates(weights, trust, ranks))
            self._gates[key] = Gates(None if self._all_open else merged, own)
        return self._gates[key]

    @functools.cached_property
    def _weights(self) -> Tensor:
        return self.sums / self.images.clamp(min=1)[:, None]

    @functools.cached_property
    def _trust(self) -> Tensor:
        return confidence(self._weights)

    @functools.cached_property
    def _has_open(self) -> bool:
        return bool((self._trust > 0).any())

    @functools.cached_property
    def _all_open(self) -> bool:
        return bool((self._trust == 1).all())


@dataclass
class _Note:
    """The task weights `(images, tasks)` of the images of one projector call."""

    weights: Tensor
    layout: ImageLayout
    images: ImageCall | None


@dataclass(eq=False)
class _Call:
    """A running `forward` or `generate`."""

    owner: nn.Module
    arguments: dict[str, Any]
    outer: _Call | None
    is_forward: bool
    inherited: dict[str, RowWeights]
    notes: dict[str, list[_Note]] = field(default_factory=dict)
    known: dict[str, RowWeights | None] = field(default_factory=dict)

    def row_weights(self, adapter_name: str) -> RowWeights | None:
        """The task weights of the rows, from the images of this call and of those before it."""
        if adapter_name not in self.known:
            found = self.inherited.get(adapter_name)
            for note in self.notes.get(adapter_name, []):
                rows = _by_row(note, self.owner, self.arguments)
                found = rows if rows is None else rows.plus(found)
            self.known[adapter_name] = found
        return self.known[adapter_name]

    def every_row_weights(self) -> dict[str, RowWeights]:
        found = {name: self.row_weights(name) for name in (*self.inherited, *self.notes)}
        return {name: weights for name, weights in found.items() if weights is not None}


# A context variable, so that threads that share one model do not see each other's calls.
_running: ContextVar[_Call | None] = ContextVar("peft_many_gated_call", default=None)


def note_images(target: GateTarget, weights: Tensor, layout: ImageLayout) -> None:
    """Note the routing weights of a projector's images, `(images, routed tasks)`, in the running call, if one is."""
    call = _running.get()
    if call is None or len(weights) == 0:
        return
    all_tasks = weights.new_zeros(len(weights), target.tasks)
    all_tasks[:, list(target.columns)] = weights
    note = _Note(all_tasks, layout, current_image_call())
    notes = call.notes.setdefault(target.adapter_name, [])
    if notes and note.images is not None and notes[-1].images is note.images:
        notes.pop()  # of several projectors the last one is nearest to the language model
    notes.append(note)
    call.known.pop(target.adapter_name, None)


def current_gates(adapter_name: str, ranks: tuple[int, ...], x: Tensor) -> Gates | None:
    """The gates of a layer's input in the running call; `None` where only the merged delta acts.

    Args:
        adapter_name (`str`): The layer's adapter.
        ranks (`tuple[int, ...]`): `r_t` of each task in the layer.
        x (`torch.Tensor`): The input, shape `(rows, …, in)` or `(rows · tokens, in)`.
    """
    call = _running.get()
    if call is None or current_image_call() is not None:  # the vision tower's rows are images
        return None
    weights = call.row_weights(adapter_name)
    if weights is None:
        return None
    rows = len(weights.images)
    if len(x) % rows or (x.dim() < 3 and len(x) not in _lengths(call.arguments)):
        _warn_once(
            f"an input of shape {tuple(x.shape)} does not say which of its rows belong to which of the {rows} rows"
        )
        return None
    return weights.gates(ranks, len(x) // rows, x.device, x.dtype)


def _lengths(arguments: dict[str, Any]) -> list[int]:
    """How many rows of its input a layer may see in a call, one for each sample or token."""
    shapes = [arguments[name].shape for name in _INPUTS if arguments.get(name) is not None]
    return [length for shape in shapes for length in (shape[0], shape[:2].numel())]


_INPUTS = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def _by_row(note: _Note, owner: nn.Module, arguments: dict[str, Any]) -> RowWeights | None:
    """Bring the images' weights to the rows of the batch; `None`, with a warning, where that cannot be told."""
    placeholders = _placeholders(note, owner, arguments)
    images, rows = len(note.weights), None
    if placeholders is not None and placeholders.sum() > 0:
        tokens = note.images.tokens if note.images is not None else None
        if tokens is not None and len(tokens) == images:
            counts = torch.tensor(tokens)
        elif placeholders.sum() == images:
            counts = torch.ones(images, dtype=torch.int64)
        else:
            counts = note.layout.lengths * placeholders.sum() // note.layout.lengths.sum()
        rows, batch = rows_of_images(counts, placeholders), len(placeholders)
    else:
        batch = next((len(arguments[name]) for name in _INPUTS if arguments.get(name) is not None), None)
        if batch == images:
            rows = torch.arange(images)
    if rows is None or batch is None:
        _warn_once(f"it cannot be told which of {images} images belong to which row of the batch")
        return None
    weights = note.weights
    rows = rows.to(weights.device)
    return RowWeights(
        weights.new_zeros(batch, weights.shape[1]).index_add(0, rows, weights),
        weights.new_zeros(batch).index_add(0, rows, weights.new_ones(images)),
    )


def _placeholders(note: _Note, owner: nn.Module, arguments: dict[str, Any]) -> Tensor | None:
    """How many tokens of each row stand for images, `(rows,)`, int64, on the CPU; `None` if that is not known."""
    modality = "image" if note.images is None else note.images.modality
    config = getattr(owner, "config", None)
    tokens = (getattr(config, f"{modality}_token_{end}", None) for end in ("id", "index"))
    token = next((token for token in tokens if token is not None), None)
    if token is None:
        return None
    ids = arguments.get("input_ids", arguments.get("inputs"))
    if ids is not None and ids.dim() == 2:
        return (ids == token).sum(dim=1).cpu()
    embeddings = arguments.get("inputs_embeds")
    if embeddings is None or not hasattr(owner, "get_input_embeddings"):
        return None
    placeholder = owner.get_input_embeddings()(torch.tensor(token, device=embeddings.device))
    return (embeddings == placeholder.to(embeddings)).all(dim=-1).sum(dim=1).cpu()


def _warn_once(what: str) -> None:
    warnings.warn(
        f"The merged LoRA is used where the adapter gates by task: {what}.",
        PeftWarning,
        stacklevel=2,
    )


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    outer = _running.get()
    if outer is not None and outer.is_forward:
        if outer.owner is not module:
            return  # a part of a model whose call is noted
        outer = outer.outer  # left behind by a call that was interrupted
    arguments = kwargs
    if args:
        arguments = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}
    inherited: dict[str, RowWeights] = {}
    if outer is not None and outer.owner is module:  # `generate`, which may have passed the images before
        inherited = outer.every_row_weights()
    if not inherited:
        inherited = _of_cache(arguments.get("past_key_values"))
    _running.set(_Call(module, arguments, outer, True, inherited))


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    call = _running.get()
    if call is None or not call.is_forward or call.owner is not module:
        return
    _running.set(call.outer)
    if output is None:  # it failed
        return
    found = call.every_row_weights()
    if call.notes and call.outer is not None and call.outer.owner is module:
        call.outer.inherited, call.outer.notes, call.outer.known = found, {}, {}
    values = (getattr(output, "past_key_values", None), call.arguments.get("past_key_values"))
    cache = next((value for value in values if isinstance(value, Cache)), None)
    if cache is None and isinstance(output, tuple):
        cache = next((value for value in output if isinstance(value, Cache)), None)
    if cache is not None and (found or CACHE_ATTRIBUTE in vars(cache)):
        setattr(cache, CACHE_ATTRIBUTE, found)


def _of_cache(cache: Any) -> dict[str, RowWeights]:
    """What was known of the rows when a cache was filled; nothing if it has been emptied since."""
    found: dict[str, RowWeights] = getattr(cache, CACHE_ATTRIBUTE, {})
    return found if found and cache.get_seq_length() > 0 else {}


class _WatchedGenerate:
    """Does what the model's own `generate` does, as one call; an object, so that copies watch themselves."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own_method())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**self.__signature__.bind_partial(*args).arguments, **kwargs}
        inherited = _of_cache(arguments.get("past_key_values"))
        token = _running.set(_Call(self.module, arguments, _running.get(), False, inherited))
        try:
            return self._own_method()(*args, **kwargs)
        finally:
            _running.reset(token)

    def _own_method(self) -> Callable[..., Any]:
        return type(self.module).generate.__get__(self.module)  # type: ignore[attr-defined, no-any-return]


def watch_gated_calls(model: nn.Module) -> None:
    """Let the model's LoRA layers know the images of the call that they run in; doing it again changes nothing."""
    for module in _entrances(model):
        if "gate_hooks" in vars(module):
            continue
        # Hooks are plain functions that get the module, so that copies of a model watch themselves.
        module.gate_hooks = (
            module.register_forward_pre_hook(_enter, with_kwargs=True),
            module.register_forward_hook(_leave, with_kwargs=True, always_call=True),
        )
        if callable(getattr(type(module), "generate", None)) and "generate" not in vars(module):
            module.generate = _WatchedGenerate(module)


def unwatch_gated_calls(model: nn.Module) -> None:
    """Undo `watch_gated_calls`."""
    for module in model.modules():
        for handle in vars(module).pop("gate_hooks", ()):
            handle.remove()
        if isinstance(vars(module).get("generate"), _WatchedGenerate):
            del module.generate


def _entrances(model: nn.Module) -> Sequence[nn.Module]:
    """What a user may call: the model, and the parts of it that take images."""
    parts = [m for m in model.modules() if any(callable(getattr(type(m), name, None)) for name in WATCHED_METHODS)]
    return list(dict.fromkeys([model, *parts]))


class GatedLinear(nn.Linear):
    """The `lora_A` of a gated merge: `h = (1 − c) A* x + c α_t A_t x`, by row of the batch.

    In the place of `lora_A`, so that it serves all kinds of LoRA layers, quantised ones too, and that everything that
    reads `lora_A.weight`, as folding the adapter into the base model does, finds the merged delta.

    Args:
        lora_A (`torch.nn.Linear`): The one that it stands in for; `A*`, shape `(Σ r_t, in)`.
        adapter_name (`str`): The adapter it belongs to.
        ranks (`Sequence[int]`): `r_t` of each task, in the order of the merge's tasks.
    """

    def __init__(self, lora_A: nn.Linear, adapter_name: str, ranks: Sequence[int]) -> None:
        super().__init__(lora_A.in_features, lora_A.out_features, bias=False, device="meta")
        self.weight = lora_A.weight
        self.task_weight = nn.Parameter(torch.zeros_like(lora_A.weight), requires_grad=lora_A.weight.requires_grad)
        self.adapter_name = adapter_name
        self.ranks = tuple(ranks)

    def forward(self, input: Tensor) -> Tensor:
        found = current_gates(self.adapter_name, self.ranks, input)
        if found is None or found.own is None:
            return super().forward(input)
        shape = (-1, *[1] * (input.dim() - 2), self.out_features)
        own = nn.functional.linear(input, self.task_weight) * found.own.reshape(shape)
        if found.merged is None:
            return own
        return super().forward(input) * found.merged.reshape((*shape[:-1], 1)) + own
