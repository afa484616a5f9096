"""Telling padding from tokens: by the attention masks of the batch, and by content where no mask reaches."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from peft.utils import PeftWarning
from torch import Tensor, nn

from ..families.projector_call import features_of
from ..families.structure import modules_around

# Of the text, and of the decoder's text in an encoder-decoder model.
MASK_NAMES = ("attention_mask", "decoder_attention_mask")


class TokenMask:
    """Which positions of a batch are tokens, by its attention mask of shape `(rows, length)`.

    Their index is made once, when first asked for. Where the mask is on a GPU, the host waits for it, then only.
    """

    def __init__(self, given: Tensor) -> None:
        self.given, self.kept = given, given.bool()
        self._indices: dict[torch.device, Tensor] = {}

    @cached_property
    def all_tokens(self) -> bool:
        """Whether there is no padding."""
        return len(self._index) == self.given.numel()

    def fits(self, inputs: Tensor) -> bool:
        """Whether it can be that of an input, `(rows, length, in)` or flattened."""
        return inputs.shape[:-1] == self.given.shape or (inputs.dim() == 2 and len(inputs) == self.given.numel())

    def tokens(self, rows: Tensor) -> Tensor:
        """Those of the flattened rows of an input that are tokens; not a copy where all are."""
        if self.all_tokens:
            return rows
        if rows.device not in self._indices:
            self._indices[rows.device] = self._index.to(rows.device, non_blocking=self._index.device.type == "cpu")
        return rows.index_select(0, self._indices[rows.device])

    @cached_property
    def _index(self) -> Tensor:
        return self.kept.reshape(-1).nonzero()[:, 0]


class TokenRows:
    """Tells which rows of the layers' inputs are tokens, while the `with` block runs.

    It follows padding of the `model` into mixtures of experts around the `layers`. Attention masks mean nothing for
    `unmasked` layers, whose inputs are no text; an encoder-decoder has a `text_encoder` with a mask of its own.
    """

    def __init__(
        self,
        layers: Collection[str] = (),
        model: nn.Module | None = None,
        unmasked: Collection[str] = (),
        text_encoder: nn.Module | None = None,
    ) -> None:
        self.unmasked, self.text_encoder = unmasked, text_encoder
        self.masks: Mapping[str, TokenMask] = {}  # of the running batch; see `MASK_NAMES`
        self._routed = RoutedRows([] if model is None else [name for name in layers if name not in unmasked])
        self._around = {} if model is None else {path: model.get_submodule(path) for path in self._routed.around}
        self._encoding = False
        self._encoded: weakref.ref[Tensor] | None = None
        self._hooks = ExitStack()
        self._warned = False

    def __enter__(self) -> TokenRows:
        for path, module in self._around.items():
            self._hooks.enter_context(module.register_forward_pre_hook(partial(self._begins, path), with_kwargs=True))
            self._hooks.enter_context(module.register_forward_hook(partial(self._ends, path)))
        if self.text_encoder is not None:
            self._hooks.enter_context(self.text_encoder.register_forward_pre_hook(self._encoder_begins))
            self._hooks.enter_context(self.text_encoder.register_forward_hook(self._encoder_ends))
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._hooks.close()
        self._routed.forget()
        if error is None and self._routed.searched and not self._routed.recognised:
            warnings.warn(
                "Padding could not be told from tokens among those that routers sent to experts, so some may have "
                "been counted. Batches without padding avoid this.",
                PeftWarning,
                stacklevel=3,
            )

    def begin_batch(self, batch: Any) -> None:
        """Take the masks of a batch, and forget what was seen of the one before."""
        self.masks = masks_of(batch, self.text_encoder is not None)
        self._routed.forget()

    def selection(self, name: str, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        """What picks the tokens among the flattened rows of a layer's input, or among as many of anything else."""
        masks = self._masks_of(name, inputs)
        mask = _mask_that_fits(inputs, masks)
        if mask is not None:
            return mask.tokens
        if all(mask.all_tokens for mask in masks):
            return _all_of
        tokens = self._routed.tokens(name, inputs.reshape(-1, inputs.shape[-1]))
        if tokens is not None:
            return lambda rows: rows[tokens]
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"The input of '{name}', of shape {tuple(inputs.shape)}, fits no attention mask of the batch, so "
                "padding could not be left out of its covariance. Batches without padding avoid this.",
                PeftWarning,
                stacklevel=2,
            )
        return _all_of

    def _begins(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs, mask = features_of(args, kwargs) if args or kwargs else None, kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:  # of LLaVA's own code it is longer than the batch's
            known = self.masks.get("inner")
            if known is None or known.given is not mask:
                self.masks = {**self.masks, "inner": TokenMask(mask)}
        self._routed.begins(path, inputs, _mask_that_fits(inputs, self._masks_of(path, inputs)))

    def _ends(self, path: str, *_: object) -> None:
        self._routed.ends(path)

    def _encoder_begins(self, *_: object) -> None:
        self._encoding = True

    def _encoder_ends(self, encoder: nn.Module, args: Any, output: Any) -> None:
        self._encoding = False
        self._encoded = weakref.ref(output if isinstance(output, Tensor) else output[0])

    def _masks_of(self, name: str, inputs: object) -> Sequence[TokenMask]:
        """The masks that can belong to an input. In an encoder-decoder, cross-attention reads the encoder's output."""
        if name in self.unmasked:
            return []
        if self.text_encoder is None:
            return list(self.masks.values())
        of_encoder = self._encoding or (self._encoded is not None and self._encoded() is inputs)
        mask = self.masks.get(MASK_NAMES[0] if of_encoder else MASK_NAMES[1])
        return [] if mask is None else [mask]


def masks_of(batch: Any, has_encoder: bool) -> dict[str, TokenMask]:
    """The 2-D attention masks of a batch: which positions are tokens and which are padding."""
    if not isinstance(batch, Mapping):
        return {}
    masks = {name: batch[name] for name in MASK_NAMES if isinstance(batch.get(name), Tensor)}
    for name, mask in masks.items():
        if mask.dim() != 2:
            warnings.warn(
                f"`{name}` has shape {tuple(mask.shape)}; only masks of shape (rows, length) tell padding from "
                "tokens, so padding is counted.",
                PeftWarning,
                stacklevel=3,
            )
    if has_encoder and MASK_NAMES[1] not in masks and isinstance(batch.get("labels"), Tensor):
        # Models make the decoder's inputs from the labels, whose padding data collators mark by -100.
        masks[MASK_NAMES[1]] = batch["labels"] != -100
    return {name: TokenMask(mask) for name, mask in masks.items() if mask.dim() == 2}


def rows_by_mask(inputs: Tensor, masks: Iterable[TokenMask]) -> Tensor:
    """The rows of `inputs` that are tokens by the mask that fits, shape `(tokens, in)`.

    Not a copy if there is no mask, or all are tokens.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    mask = _mask_that_fits(inputs, masks)
    return rows if mask is None else mask.tokens(rows)


def _all_of(rows: Tensor) -> Tensor:
    return rows


def _mask_that_fits(inputs: object, masks: Iterable[TokenMask]) -> TokenMask | None:
    """The mask of the rows of an input."""
    return next((mask for mask in masks if mask.fits(inputs)), None) if isinstance(inputs, Tensor) else None


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Known:
    """What is known of the rows that went into a module."""

    tokens: Tensor  # which of them are tokens, (rows,), bool
    padding: Tensor  # a hash of each row of padding
    width: int  # features of a row


class RoutedRows:
    """Tells padding of layers inside mixtures of experts, where each expert gets some of the rows and no mask.

    Follows rows of padding from a module whose input fits the attention mask into the modules inside of it. A router
    copies rows to experts as they are, so that a row of padding is known by its content. Layers further inside an
    expert get other features, but one row for each of the expert's.

    Modules' inputs are only held while they run, and looked at when a layer inside asks. Where all fit the mask, none
    does; else each such layer lets the host wait for a GPU, as the router did before it.
    """

    def __init__(self, layers: Collection[str]) -> None:
        self.around = {path for layer in layers for path in modules_around(layer)}
        self._running: dict[str, tuple[Tensor, TokenMask | None]] = {}
        self._known: dict[str, _Known | None] = {}
        # Whether rows were compared, and padding was among them: a router that changes rows would hide it.
        self.searched = self.recognised = False

    def begins(self, path: str, inputs: object, mask: TokenMask | None) -> None:
        """Note what goes into a module `around` the layers, and the attention mask that fits it, if one does."""
        self.ends(path)
        if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.dim() >= 2:
            self._running[path] = inputs, mask

    def ends(self, path: str) -> None:
        """Let go of what went into a module."""
        self._running.pop(path, None)
        self._known.pop(path, None)

    def tokens(self, layer: str, rows: Tensor) -> Tensor | None:
        """Which rows of a layer's input, shape `(rows, in)`, are tokens; `None` if that cannot be told."""
        outer = self._outer(layer, rows)
        return None if outer is None else self._tokens(rows, outer)

    def forget(self) -> None:
        self._running.clear()
        self._known.clear()

    def _outer(self, path: str, rows: Tensor) -> _Known | None:
        """The nearest module around another one that got the same rows, or from which rows may have been copied."""
        around = (self._of(parent) for parent in modules_around(path) if parent in self._running)
        return next(
            (one for one in around if one and (len(one.tokens) == len(rows) or one.width == rows.shape[1])), None
        )

    def _of(self, path: str) -> _Known | None:
        """What is known of the rows that went into a running module, found once."""
        if path not in self._known:
            inputs, mask = self._running[path]
            rows = inputs.reshape(-1, inputs.shape[-1])
            found: _Known | None = None
            if mask is not None:
                tokens = mask.kept.reshape(-1).to(rows.device)
                found = _Known(tokens, _hashes(rows[~tokens]), rows.shape[1])
            elif (outer := self._outer(path, rows)) is not None:
                found = _Known(self._tokens(rows, outer), outer.padding, rows.shape[1])
            self._known[path] = found
        return self._known[path]

    def _tokens(self, rows: Tensor, outer: _Known) -> Tensor:
        if rows.shape[1] == outer.width:
            padding = torch.isin(_hashes(rows), outer.padding.to(rows.device))
            self.searched = True
            self.recognised = self.recognised or bool(padding.any())
            if padding.any() or len(rows) != len(outer.tokens):
                return ~padding
        return outer.tokens.to(rows.device)


def _hashes(rows: Tensor) -> Tensor:
    """A number for the very bits of each row, shape `(rows,)`, int64; products wrap around."""
    bits = rows.contiguous().view(_BITS[rows.element_size()]).long()
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(1 << 62, (rows.shape[1],), generator=generator) * 2 + 1
    return (bits * odd.to(rows.device)).sum(1)
