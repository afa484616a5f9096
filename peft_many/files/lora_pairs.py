"""The LoRA pairs in an adapter's file, checked against its config."""

from __future__ import annotations

import math

from peft import LoraConfig
from torch import Tensor

from ..records import merge_of
from .patterns import MODULE_NAME, ByPattern, check_patterns
from .stored_delta import KEY_PREFIX, TASK_WEIGHT, StoredPair, UnmergeableAdapterError, check_finite
from .tensor_file import TensorFile


def split_pairs(
    adapter: str, config: LoraConfig, weights: TensorFile
) -> tuple[dict[str, StoredPair], dict[str, Tensor]]:
    """The LoRA pairs by layer, and all other tensors by key without PEFT's prefix."""
    merge = merge_of(config)
    is_gated = merge is not None and merge.options.gate_lora
    halves: dict[str, set[str]] = {}
    rest: dict[str, Tensor] = {}
    for key in weights:
        if not key.startswith(KEY_PREFIX):
            raise UnmergeableAdapterError(f"{adapter}: tensor '{key}' does not begin with '{KEY_PREFIX}'.")
        name = key.removeprefix(KEY_PREFIX)
        if not MODULE_NAME.fullmatch(name):  # it will be part of patterns, tables and messages
            raise UnmergeableAdapterError(f"{adapter}: tensor {key!r:.200} is not called as modules are.")
        half = next((half for half in "AB" if name.endswith(f".lora_{half}.weight")), None)
        if half is not None:
            halves.setdefault(name.removesuffix(f".lora_{half}.weight"), set()).add(half)
        elif is_gated and name.endswith(f".{TASK_WEIGHT}"):
            continue  # the statistics hold every `A_t`
        elif ".lora_embedding_" in name:
            raise UnmergeableAdapterError(
                f"{adapter}: tensor '{name}' is LoRA on an embedding; only linear layers can be merged."
            )
        elif ".lora_" in name:
            raise UnmergeableAdapterError(
                f"{adapter}: tensor '{name}' is no plain LoRA weight of a linear layer and cannot be merged."
            )
        else:
            rest[name] = weights[key]
            check_finite(rest[name], f"{weights.path}: tensor '{key}'")
    check_patterns(config, list(halves), adapter, only_ranks=True)
    ranks = ByPattern(config.rank_pattern, config.r)
    alphas = ByPattern(config.alpha_pattern, config.lora_alpha)
    pairs = {}
    for module, found in halves.items():
        if found != {"A", "B"}:
            raise UnmergeableAdapterError(f"{adapter}: layer '{module}' lacks its lora_{'AB'.strip(*found)} tensor.")
        rank, alpha = ranks[module], alphas[module]
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        pairs[module] = _checked_pair(adapter, StoredPair(weights, module, scaling), rank)
    if not pairs:
        raise UnmergeableAdapterError(f"{adapter} holds no LoRA weights.")
    return pairs, rest


def _checked_pair(adapter: str, pair: StoredPair, rank: int) -> StoredPair:
    A, B, module = pair.shape("A"), pair.shape("B"), pair.module
    if len(A) != 2 or len(B) != 2:
        raise UnmergeableAdapterError(f"{adapter}: layer '{module}' is no linear layer (LoRA shape {A}).")
    if not A[0] == B[1] == rank:
        raise UnmergeableAdapterError(
            f"{adapter}: layer '{module}' has LoRA shapes {A} and {B}, but its config says rank {rank}."
        )
    if 0 in (*A, *B):
        raise UnmergeableAdapterError(f"{adapter}: layer '{module}' has an empty LoRA, of shapes {A} and {B}.")
    return pair
