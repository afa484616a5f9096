"""The task weights of a batch's rows, what they make of the rows' LoRA, and how they live on in a cache."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft.utils import PeftWarning
from torch import Tensor
from transformers import Cache

from ..algebra.devices import moved
from ..algebra.gating import confidence, gates
from ..algebra.routing import joint_weights
from .watched import WatchedMethod, watch

# The attribute of a cache object that holds the task weights of its rows, by adapter. Copies of a cache take it along.
CACHE_ATTRIBUTE = "peft_many_row_weights"

# Public methods of caches that change which row is where.
_MOVES_ROWS = ("reorder_cache", "batch_select_indices")

# The arguments of a model that have a row for each sample.
_INPUTS = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


class Gates(NamedTuple):
    """What a layer's products with `A*` and with the tasks' own `A_t` are multiplied by."""

    merged: Tensor | None  # (rows, 1); `None` where it is zero in all rows
    own: Tensor  # (rows, Σ r_t)
    columns: slice | Tensor = slice(None)  # outside of which both are zero, so that nothing is computed there
    are_one: bool = False  # whether all of `own` is, there


class RowWeights:
    """The task weights of a batch's rows, by the mean over their images and by their instructions; on the CPU."""

    def __init__(
        self,
        sums: Tensor,
        images: Tensor,
        start: int,
        scores: Tensor | None = None,
        before: RowWeights | None = None,
        fits: Tensor | None = None,
    ) -> None:
        self.sums = sums  # over the images of each row, `(rows, tasks)`, float32
        self.images = images  # how many these are, `(rows,)`, float32
        self.start = start  # how many tokens the cache held when the last of the images or instructions came
        self.scores = scores  # of the tasks by the last instruction of each row, `(rows, tasks)`, if it was read
        self.before = before  # what was known before these came
        self.fits = fits  # which tasks take one of the row's images, `(rows, tasks)`, bool; `None` if any may
        self._gates: dict[tuple[Any, ...], Gates] = {}

    def plus(self, other: RowWeights) -> RowWeights:
        """Of both their images, and of the other's instructions, if it has any.

        Where one has several rows to each of the other's, as with beams, these share them.
        """
        rows = max(len(self.images), len(other.images))
        one, two = (part.repeated(rows // len(part.images)) for part in (self, other))
        scores = one.scores if two.scores is None else two.scores
        known = [part.fits for part in (one, two) if part.fits is not None]
        fits = functools.reduce(torch.logical_or, known) if known else None
        return RowWeights(one.sums + two.sums, one.images + two.images, max(one.start, two.start), scores, one, fits)

    def repeated(self, repeats: int) -> RowWeights:
        """Of rows that follow one another several times."""
        return self.taken(torch.arange(len(self.images)).repeat_interleave(repeats))

    def taken(self, rows: Tensor) -> RowWeights:
        """Of some rows, by their places or a mask, in this order."""
        rows = rows.cpu()
        scores = None if self.scores is None else self.scores[rows]
        before = None if self.before is None else self.before.taken(rows)
        fits = None if self.fits is None else self.fits[rows]
        return RowWeights(self.sums[rows], self.images[rows], self.start, scores, before, fits)

    def by_images(self) -> RowWeights:
        """Of the images alone."""
        return RowWeights(self.sums, self.images, self.start, before=self.before, fits=self.fits)

    def up_to(self, length: int) -> RowWeights | None:
        """What was known of the first `length` tokens that a cache held."""
        found: RowWeights | None = self
        while found is not None and found.start >= length:
            found = found.before
        return found

    def gates(self, ranks: tuple[int, ...], repeats: int, dtype: torch.dtype, device: torch.device) -> Gates | None:
        """The gates of a layer that sees each row `repeats` times; `None` if every row gets the merged delta."""
        if self._are_all_merged:  # asked by every layer, for every token
            return None
        key = (ranks, repeats, dtype, device)
        if key not in self._gates:
            merged, own = gates(self.weights, confidence(self.weights), self.merged, ranks)
            any_merged = bool(self.merged.any())
            columns = slice(None) if any_merged else _places(own.any(0))
            are_one = bool((own[:, columns] == 1).all())
            if isinstance(columns, Tensor):
                columns = moved(columns, device)
            merged, there = (moved(one.to(dtype).repeat_interleave(repeats, dim=0), device) for one in (merged, own))
            self._gates[key] = Gates(merged if any_merged else None, there, columns, are_one)
        return self._gates[key]

    @functools.cached_property
    def _are_all_merged(self) -> bool:
        return bool((self.merged > 0).all())

    @functools.cached_property
    def weights(self) -> Tensor:
        """What each task counts for each row, `(rows, tasks)`; zero where nothing is known."""
        means, seen = self.sums / self.images.clamp(min=1)[:, None], self.images[:, None] > 0
        if self.scores is None:
            return means
        # Where no image was seen, all tasks are as likely.
        return joint_weights(
            self.scores, torch.where(seen, means, 1.0), None if self.fits is None else self.fits | ~seen
        )

    @functools.cached_property
    def merged(self) -> Tensor:
        """1 for rows that get the merged delta, as no single task is likely or nothing is known; else 0, `(rows,)`."""
        known = torch.ones_like(self.images, dtype=torch.bool) if self.scores is not None else self.images > 0
        like_none = known & (self.weights == 0).all(dim=-1)
        return (1 - confidence(self.weights)).masked_fill(like_none, 0.0)


def _places(used: Tensor) -> slice | Tensor:
    """Where a mask is true: from the first place to the last, or the places themselves where these are far apart.

    Taking these out of a layer's factors copies them, which pays from about a quarter on. Where nothing is true,
    everything.
    """
    places = used.nonzero()[:, 0]
    if not len(places):
        return slice(None)
    between = slice(int(places[0]), int(places[-1]) + 1)
    return places if 4 * len(places) <= between.stop - between.start else between


def remember(cache: Cache, known: Mapping[str, RowWeights]) -> None:
    """Let a cache hold what is known of its rows, for decoding steps and further turns; it dies with the cache."""
    if known or hasattr(cache, CACHE_ATTRIBUTE):
        setattr(cache, CACHE_ATTRIBUTE, known)
        for name in _MOVES_ROWS:
            watch(cache, name, _RowsFollow)


def remembered(cache: Any) -> dict[str, RowWeights]:
    """What is known of the rows whose tokens a cache holds, also if it was cut back since."""
    known: dict[str, RowWeights] = getattr(cache, CACHE_ATTRIBUTE, {})
    found = {name: rows.up_to(cached_length(cache)) for name, rows in known.items()}
    return {name: rows for name, rows in found.items() if rows is not None}


def cached_length(cache: Any) -> int:
    """How many tokens a cache holds; none if it is no cache."""
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0


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


def repeats_of_rows(shape: Sequence[int], rows: int, arguments: Mapping[str, Any]) -> int | None:
    """How many rows of a layer's input belong to each row of the batch; `None`, with a warning, if it is unclear.

    Rows of the batch may be repeated in the input, as with beams, and its tokens may lie in one dimension with them.
    Other inputs of two dimensions, such as the tokens that a router sent to an expert, could be anybody's.
    """
    length = shape[0]
    told = len(shape) > 2 or any(length in (of[0], of[:2].numel()) for of in shapes_of_batch(arguments))
    if length % rows or not told:
        warn_of_merged(f"a layer's input of shape {tuple(shape)} does not say what belongs to which of {rows} samples")
        return None
    return length // rows


def warn_of_merged(why: str, instead: str = "The merged LoRA is used for these samples, not their tasks' own") -> None:
    """Warn that rows get the merged LoRA although the adapter is gated."""
    warnings.warn(f"{instead}: {why}.", PeftWarning, stacklevel=3)


def refuse_checkpointing(model: Any, adapter_name: str) -> None:
    """Raise where layers would be run again when the call, and what is known of its rows, is over."""
    if torch.is_grad_enabled() and model.training and getattr(model, "is_gradient_checkpointing", False):
        raise RuntimeError(
            f"The adapter '{adapter_name}' is a merge with `gate_lora`, which does not go with gradient "
            "checkpointing. Call `model.eval()` or `model.gradient_checkpointing_disable()`."
        )


def shapes_of_batch(arguments: Mapping[str, Any]) -> list[torch.Size]:
    """The shapes of those arguments of a model that have a row for each sample."""
    values = (arguments.get(name) for name in _INPUTS)
    return [value.shape for value in values if isinstance(value, Tensor)]
