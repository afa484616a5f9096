"""Keeping what goes into layers and comes out of them, for refitting; and which layers share an input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..families.projector_call import features_of
from .tokens import TokenMask, rows_by_mask


class _Enough(Exception):  # noqa: N818 - no error
    """Ends a forward pass once everything has been seen."""


class LayerCapture:
    """Keeps inputs and outputs of some layers that share an input, and ends each forward pass after them.

    Each `with` block is for one forward pass; the next one adds to what was seen.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.masks: Mapping[str, TokenMask] = {}  # set before each pass; see `MASK_NAMES`
        self._inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._waiting: set[str] = set()
        self._hooks = ExitStack()

    def __enter__(self) -> LayerCapture:
        self._waiting = set(self.layers)
        for name, layer in self.layers.items():
            self._hooks.enter_context(layer.register_forward_hook(partial(self._keep, name), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._hooks.close()
        return kind is _Enough

    def inputs(self, name: str) -> Tensor:
        """All tokens that arrived at a layer, shape `(tokens, in)`."""
        return torch.cat(self._inputs[name])

    def outputs(self, name: str) -> Tensor:
        """What came out of a layer for them, shape `(tokens, out)`."""
        return torch.cat(self._outputs[name])

    def _keep(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        for kept, tensor in ((self._inputs, features_of(args, kwargs)), (self._outputs, output)):
            kept[name].append(rows_by_mask(tensor, self.masks.values()).clone())
        self._waiting.discard(name)
        if not self._waiting:
            raise _Enough


def layers_by_input(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[list[str]]:
    """The layers in the order in which they run, each once, in a forward pass; those that share an input together."""
    arrived: list[tuple[str, Tensor]] = []

    def note(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived.append((name, features_of(args, kwargs)))

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(note, name), with_kwargs=True))
        run()
    calls = Counter(name for name, _ in arrived)
    strange = next((name for name in layers if calls[name] != 1), None)
    if strange is not None:
        raise RuntimeError(
            f"'{strange}' runs {calls[strange]} times in a forward pass, so the merge cannot be refitted layer by "
            "layer: each has to run once."
        )
    groups: dict[int, list[str]] = {}
    for name, inputs in arrived:  # which keeps the tensors alive, so that no two have one id
        groups.setdefault(id(inputs), []).append(name)
    return list(groups.values())
