"""The LoRA pairs in an adapter's file, checked against its config."""

from __future__ import annotations

import math

from peft import LoraConfig

from ..records import merge_of
from .errors import UnmergeableAdapterError
from .patterns import ByPattern, check_patterns
from .stored_delta import StoredPair, check_floating
from .tensor_file import TensorFile
from .tensor_keys import KEY_PREFIX, SHARDED, TASK_WEIGHT, TensorKeys

_HALVES = {"lora_A.weight", "lora_B.weight"}


def lora_pairs(adapter: str, config: LoraConfig, weights: TensorFile, keys: TensorKeys) -> dict[str, StoredPair]:
    """The LoRA pairs by layer; `keys` are those of the file."""
    if keys.shared:
        raise UnmergeableAdapterError(f"{adapter}: tensor '{keys.shared[0]}' does not begin with '{KEY_PREFIX}'.")
    if not keys.own:
        raise UnmergeableAdapterError(f"{adapter} holds no LoRA weights.")
    merge = merge_of(config)
    is_gated = merge is not None and merge.options.gate_lora
    for module, own in keys.own.items():
        # Of the tasks' own `A_t` that a gated merge holds beside them the statistics know everything.
        found = {key.removeprefix(f"{KEY_PREFIX}{module}.") for key in own} - ({TASK_WEIGHT} if is_gated else set())
        strange, lost = min(found - _HALVES, default=None), min(_HALVES - found, default=None)
        if strange is not None:
            raise UnmergeableAdapterError(
                f"{adapter}: tensor '{module}.{strange}' is no plain LoRA weight of a linear layer and cannot be "
                "merged."
            )
        if lost is not None:
            raise UnmergeableAdapterError(
                f"{adapter}: layer '{module}' lacks its {lost.split('.')[0]} tensor: the file is incomplete; "
                "save or download the adapter again."
            )
        for key in own:
            check_floating(weights, key)
    check_patterns(config, list(keys.own), adapter, only_ranks=True)
    ranks = ByPattern(config.rank_pattern, config.r)
    alphas = ByPattern(config.alpha_pattern, config.lora_alpha)
    pairs = {}
    for module in keys.own:
        rank = ranks[module]
        scaling = alphas[module] / (math.sqrt(rank) if config.use_rslora else rank)
        pairs[module] = StoredPair(weights, module, scaling)
        _check_shapes(adapter, pairs[module], rank)
    return pairs


def _check_shapes(adapter: str, pair: StoredPair, rank: int) -> None:
    A, B, module = pair.shape("A"), pair.shape("B"), pair.module
    if not A[0] == B[1] == rank:
        raise UnmergeableAdapterError(
            f"{adapter}: layer '{module}' has LoRA shapes {A} and {B}, but its config says rank {rank}: "
            "config and weights are of different adapters."
        )
    if 0 in (*A, *B):
        raise UnmergeableAdapterError(
            f"{adapter}: layer '{module}' has an empty LoRA, of shapes {A} and {B}: {SHARDED}."
        )
