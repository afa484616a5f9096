"""The LoRA weights of a layer, written in place and put back."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..algebra.lpm import LowRankDelta


class LoraPair:
    """One layer's LoRA weights, which are written in place."""

    def __init__(self, layer: Any, adapter_name: str) -> None:
        self.A: Tensor = layer.lora_A[adapter_name].weight.data
        self.B: Tensor = layer.lora_B[adapter_name].weight.data
        self.scaling: float = layer.scaling[adapter_name]

    def nothing(self) -> LowRankDelta:
        """A delta of rank 0, for a task that did not train the layer."""
        return LowRankDelta(A=self.A[:0], B=self.B[:, :0])

    def set(self, delta: LowRankDelta) -> None:
        """Take a delta of at most this rank; the rest is zero."""
        rank = len(delta.A)
        for weight in (self.A, self.B):
            weight.zero_()
        self.A[:rank] = (delta.A / self.scaling).to(self.A)
        self.B[:, :rank] = delta.B.to(self.B)


@contextlib.contextmanager
def put_back(pairs: Collection[LoraPair], after_errors_only: bool = False) -> Iterator[None]:
    """The weights are afterwards as before; with `after_errors_only` they stay as they are if the block ends well."""
    before = [(pair, pair.A.clone(), pair.B.clone()) for pair in pairs]
    ended_well = False
    try:
        yield
        ended_well = True
    finally:
        if not (ended_well and after_errors_only):
            for pair, A, B in before:
                pair.A.copy_(A)
                pair.B.copy_(B)


@contextlib.contextmanager
def own_in_place(pairs: Mapping[str, LoraPair], own: Mapping[str, LowRankDelta]) -> Iterator[None]:
    """A task's own deltas, by layer, in place of a merge's while the block runs."""
    with put_back(pairs.values()):
        for path, pair in pairs.items():
            pair.set(own.get(path, pair.nothing()))
        yield
