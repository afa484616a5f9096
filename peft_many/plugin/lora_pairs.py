"""The LoRA pairs in an adapter's file, checked against its config."""

from __future__ import annotations

import math

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from .stored_delta import KEY_PREFIX, TASK_WEIGHT, StoredPair, UnmergeableAdapterError, check_finite
from .tensor_file import TensorFile


def split_pairs(
    adapter: str, config: LoraConfig, weights: TensorFile
) -> tuple[dict[str, StoredPair], dict[str, Tensor]]:
    """The LoRA pairs by layer, and all other tensors by key without PEFT's prefix."""
    halves: dict[str, set[str]] = {}
    rest: dict[str, Tensor] = {}
    for key in weights:
        if not key.startswith(KEY_PREFIX):
            raise UnmergeableAdapterError(f"{adapter}: tensor '{key}' does not begin with '{KEY_PREFIX}'.")
        name = key.removeprefix(KEY_PREFIX)
        half = next((half for half in "AB" if name.endswith(f".lora_{half}.weight")), None)
        if half is not None:
            halves.setdefault(name.removesuffix(f".lora_{half}.weight"), set()).add(half)
        elif getattr(config, "gate_lora", False) and name.endswith(f".{TASK_WEIGHT}"):
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
    pairs = {}
    for module, found in halves.items():
        if found != {"A", "B"}:
            raise UnmergeableAdapterError(f"{adapter}: layer '{module}' lacks its lora_{'AB'.strip(*found)} tensor.")
        pairs[module] = _checked_pair(adapter, config, weights, module)
    if not pairs:
        raise UnmergeableAdapterError(f"{adapter} holds no LoRA weights.")
    return pairs, rest


def _checked_pair(adapter: str, config: LoraConfig, weights: TensorFile, module: str) -> StoredPair:
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    pair = StoredPair(weights, module, scaling)
    A, B = pair.shape("A"), pair.shape("B")
    if len(A) != 2 or len(B) != 2:
        raise UnmergeableAdapterError(f"{adapter}: layer '{module}' is no linear layer (LoRA shape {A}).")
    if not A[0] == B[1] == rank:
        raise UnmergeableAdapterError(
            f"{adapter}: layer '{module}' has LoRA shapes {A} and {B}, but its config says rank {rank}."
        )
    if not math.isfinite(scaling):
        raise UnmergeableAdapterError(f"{adapter}: layer '{module}' has the scaling {scaling} (`lora_alpha` {alpha}).")
    return pair
