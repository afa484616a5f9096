"""The factors of a merge with `gate_lora`: the merged `lora_A`, the tasks' own beside it, and `lora_B`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..files.patterns import ByPattern
from ..records import MergeRecord
from ..routing.gates import current_gates
from .layers import lora_layers
from .merged_linear import MergedLinear


class GatedLinear(MergedLinear):
    """`h = (1 − c) A* x + c α_t A_t x` for each row of the batch, with `c α_t` repeated `r_t` times; `B` follows.

    It takes the place of `lora_A`, whose `weight` is `A*`, so that it serves LoRA layers of all kinds, quantised ones
    too; what reads that, as folding the adapter into the base model does, finds the merged delta.
    """

    def __init__(self, lora_A: nn.Linear, adapter_name: str, ranks: Sequence[int]) -> None:
        super().__init__(lora_A)
        self.task_weight = nn.Parameter(torch.zeros_like(lora_A.weight), requires_grad=lora_A.weight.requires_grad)
        self.adapter_name = adapter_name
        self.ranks = tuple(ranks)

    def forward(self, input: Tensor) -> Tensor:
        """As `lora_A`'s; `input` has shape `(rows, …, in)` or `(rows · tokens, in)`."""
        gates = current_gates(self.adapter_name, self.ranks, input)
        if gates is None:
            return super().forward(input)
        between = [1] * (input.dim() - 2)
        own = nn.functional.linear(input, _part(self.task_weight, 0, gates.columns))
        if not gates.are_one:
            own = own * _part(gates.own, 1, gates.columns).reshape(-1, *between, own.shape[-1])
        if gates.merged is None:
            return own
        return super().forward(input) * gates.merged.reshape(-1, *between, 1) + own


class ColumnsLinear(MergedLinear):
    """The `lora_B` behind a `GatedLinear`, which may give it a part of the columns: those of the tasks that are there.

    A call costs what the adapters of its rows' tasks cost, however many were merged.
    """

    def __init__(self, lora_B: nn.Linear, lora_A: GatedLinear) -> None:
        super().__init__(lora_B)
        self.adapter_name = lora_A.adapter_name
        self.ranks = lora_A.ranks

    def forward(self, input: Tensor) -> Tensor:
        """As `lora_B`'s; `input` has shape `(rows, …, columns)`."""
        if input.shape[-1] == self.in_features:
            return super().forward(input)
        gates = current_gates(self.adapter_name, self.ranks, input)
        assert gates is not None
        return nn.functional.linear(input, _part(self.weight, 1, gates.columns), self.bias)


def _part(matrix: Tensor, dim: int, columns: slice | Tensor) -> Tensor:
    """Some rows (`dim=0`) or columns of a matrix."""
    if isinstance(columns, Tensor):
        return matrix.index_select(dim, columns)
    return matrix[columns] if dim == 0 else matrix[:, columns]


def gate_layers(model: nn.Module, adapter_name: str, merge: MergeRecord) -> None:
    """Give the LoRA layers of a merge the place for the tasks' own `A_t`, if it is gated."""
    if not merge.options.gate_lora:
        return
    ranks_of = ByPattern(merge.task_rank_pattern, merge.task_ranks)
    for name, layer in lora_layers(model, adapter_name).items():
        ranks = ranks_of[name]
        if ranks is None or sum(ranks) != layer.r[adapter_name]:
            raise ValueError(
                f"The adapter's config has `gate_lora`, but its `task_ranks` {ranks} do not add up to the rank "
                f"{layer.r[adapter_name]} of '{name}': config and weights are of different merges; save or download "
                "the merge again."
            )
        gated = layer.lora_A[adapter_name] = GatedLinear(layer.lora_A[adapter_name], adapter_name, ranks)
        layer.lora_B[adapter_name] = ColumnsLinear(layer.lora_B[adapter_name], gated)
