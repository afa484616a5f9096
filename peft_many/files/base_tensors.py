"""Tensors of the base model that PEFT saves beside an adapter although nobody trained them.

These are the weights of an output head that has a LoRA, and the embeddings where the vocabulary was resized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from peft import PeftConfig
from torch import Tensor

from .errors import UnmergeableAdapterError
from .projectors import is_saved_whole

# By the names of transformers' families: there is no model to look at.
_VOCABULARY = re.compile(
    r"(?P<module>(?:.+\.)?(?:embed_tokens|embed_in|embed_out|lm_head|shared|tok_embeddings|word_embeddings|wte))"
    r"\.(?:base_layer\.)?(?P<part>weight|bias)"
)


def split_base_tensors(
    adapter: str, config: PeftConfig, rest: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those among the tensors that belong to no layer's delta, by their names in the base model, and the others."""
    base: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in rest.items():
        found = _VOCABULARY.fullmatch(key)
        if found is None or is_saved_whole(found["module"], config):
            others[key] = tensor
            continue
        if tensor.dim() != (2 if found["part"] == "weight" else 1):
            raise UnmergeableAdapterError(f"{adapter}: tensor '{key}' has the impossible shape {tuple(tensor.shape)}.")
        base[f"{found['module']}.{found['part']}"] = tensor
    return base, others


def same_tensor(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal to the bit, up to the cast of one to the other's dtype."""
    narrow = max(one.dtype, two.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(one.to(narrow), two.to(narrow))
