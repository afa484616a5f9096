"""Telling padding from tokens inside mixtures of experts, where each expert gets some of the rows and no mask."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Seen:
    """The rows that went into a module.

    Args:
        tokens (`torch.Tensor`): Which of them are tokens, shape `(rows,)`, bool.
        padding (`torch.Tensor`): A hash of each row of padding.
        width (`int`): Features of a row.
    """

    tokens: Tensor
    padding: Tensor
    width: int


class RoutedRows:
    """Follows rows of padding from a module whose input fits the attention mask into the modules inside of it.

    A router copies rows to experts as they are, so that a row of padding is known by its content. Layers further
    inside an expert get other features, but one row for each of the expert's.

    Args:
        layers (`Collection[str]`): The paths of the layers to tell it for.
    """

    def __init__(self, layers: Collection[str]) -> None:
        self.around = {path for layer in layers for path in _parents(layer)}
        self._seen: dict[str, _Seen] = {}
        # Whether rows were compared, and padding was among them: a router that changes rows would hide it.
        self.searched = self.recognised = False

    def note(self, path: str, inputs: object, tokens: Tensor | None) -> None:
        """Note what goes into one of the modules `around` the layers.

        Args:
            path (`str`): Of the module.
            inputs (`object`): Its first argument.
            tokens (`torch.Tensor`, *optional*): Which rows are tokens, if the attention mask fits; any shape, bool.
        """
        self._seen.pop(path, None)
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() < 2:
            return
        rows = inputs.reshape(-1, inputs.shape[-1])
        if tokens is not None:
            tokens = tokens.reshape(-1).to(rows.device)
            self._seen[path] = _Seen(tokens, _hashes(rows[~tokens]), rows.shape[1])
            return
        outer = self._outer(path, rows)
        if outer is not None:
            self._seen[path] = _Seen(self._tokens(rows, outer), outer.padding, rows.shape[1])

    def tokens(self, layer: str, rows: Tensor) -> Tensor | None:
        """Which rows of a layer's input, shape `(rows, in)`, are tokens; `None` if that cannot be told."""
        outer = self._outer(layer, rows)
        return None if outer is None else self._tokens(rows, outer)

    def forget(self) -> None:
        """Forget the rows of this batch."""
        self._seen.clear()

    def _outer(self, path: str, rows: Tensor) -> _Seen | None:
        """The nearest module around another one that got the same rows, or from which rows may have been copied."""
        around = [self._seen[parent] for parent in _parents(path) if parent in self._seen]
        return next((seen for seen in around if len(seen.tokens) == len(rows) or seen.width == rows.shape[1]), None)

    def _tokens(self, rows: Tensor, outer: _Seen) -> Tensor:
        if rows.shape[1] == outer.width:
            padding = torch.isin(_hashes(rows), outer.padding)
            self.searched = True
            self.recognised = self.recognised or bool(padding.any())
            if padding.any() or len(rows) != len(outer.tokens):
                return ~padding
        return outer.tokens


def _parents(path: str) -> list[str]:
    """The paths of the modules around one, the nearest first."""
    return [path.rsplit(".", levels)[0] for levels in range(1, path.count(".") + 1)]


def _hashes(rows: Tensor) -> Tensor:
    """A number for the very bits of each row, shape `(rows,)`, int64; products wrap around."""
    bits = rows.contiguous().view(_BITS[rows.element_size()]).long()
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(1 << 62, (rows.shape[1],), generator=generator) * 2 + 1
    return (bits * odd.to(rows.device)).sum(1)
