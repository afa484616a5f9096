"""Adapters put together from parts of others: one's LoRA with another's projectors, or several LoRAs added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_many import MAnyConfig
from peft_many.exports.routed import without_gate
from peft_many.files.adapter import read_adapter
from peft_many.hub.sources import find_adapter

Pairs = dict[str, tuple[Tensor, Tensor]]  # by layer: A (r, in), with the scaling, and B (out, r)
_KEY = "base_model.model.{}.lora_{}.weight"


def with_parts(base: Callable[[], nn.Module], lora: Path | Pairs, projectors: Path | None) -> PeftModel:
    """The LoRA of one adapter with the projectors of another, routed if the other is a merge.

    Args:
        base (`Callable`): Gives a fresh base model.
        lora (`Path` or pairs): Whose LoRA.
        projectors (`Path`, *optional*): Whose projectors; the base model's if not given.
    """
    pairs = pairs_of(lora) if isinstance(lora, Path) else lora
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in pairs.items():
        tensors |= {_KEY.format(name, "A"): A.contiguous(), _KEY.format(name, "B"): B.contiguous()}
    options: dict[str, Any] = {"projector_modules": []}
    if projectors is not None:
        config = PeftConfig.from_pretrained(str(projectors))
        merge = None if config.merge is None else without_gate(config.merge)
        options = {"projector_modules": config.projector_modules, "merge": merge}
        stored = load_file(projectors / SAFETENSORS_WEIGHTS_NAME)
        tensors |= {key: tensor for key, tensor in stored.items() if ".lora_" not in key}
    ranks = {name.replace(".", r"\."): len(A) for name, (A, _) in pairs.items()}
    # The scaling is in `A`, so every alpha is its rank.
    config = MAnyConfig(
        r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=dict(ranks), target_modules=sorted(pairs), **options
    )
    model = get_peft_model(base(), config)
    set_peft_model_state_dict(model, tensors)
    return model.eval()


def pairs_of(folder: Path) -> Pairs:
    """An adapter's LoRA."""
    adapter = read_adapter(find_adapter(folder))
    return {name: (delta.A, delta.B) for name, pair in adapter.pairs.items() for delta in [pair.read()]}


def added(parts: Sequence[Pairs]) -> Pairs:
    """`Σ_t ΔW_t`, exactly: the `A` stacked, the `B` side by side."""
    return {
        name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts], dim=1))
        for name in parts[0]
    }
