"""The `lora_A` of a merge with `gate_lora`: the merged one, and the tasks' own beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

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
        of_merged, of_own = gates
        between = [1] * (input.dim() - 2)
        own = nn.functional.linear(input, self.task_weight) * of_own.reshape(-1, *between, self.out_features)
        if of_merged is None:
            return own
        return super().forward(input) * of_merged.reshape(-1, *between, 1) + own


def gate_layers(model: nn.Module, adapter_name: str, merge: MergeRecord) -> None:
    """Give the LoRA layers of a merge the place for the tasks' own `A_t`, if it is gated."""
    if not merge.options.gate_lora:
        return
    for name, layer in lora_layers(model, adapter_name).items():
        ranks = merge.task_rank_pattern.get(get_pattern_key(merge.task_rank_pattern, name), merge.task_ranks)
        if ranks is None or sum(ranks) != layer.r[adapter_name]:
            raise ValueError(
                f"The adapter's config has `gate_lora`, but its `task_ranks` {ranks} do not make up the rank "
                f"{layer.r[adapter_name]} of '{name}'. Only merging writes these."
            )
        layer.lora_A[adapter_name] = GatedLinear(layer.lora_A[adapter_name], adapter_name, ranks)
