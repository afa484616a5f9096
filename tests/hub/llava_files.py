"""Checkpoints as the LLaVA repository leaves them, of the tiny LLaVA's sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LAYERS = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
CONFIG = {
    "base_model_name_or_path": "/somebody/llava-v1.5-7b",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "revision": None,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


def lora(seed: int = 0, ranks: dict[str, int] | None = None) -> dict[str, torch.Tensor]:
    """LoRA weights under the names that the LLaVA repository saves."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(2):
        for name, (out, width) in LAYERS.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            rank = (ranks or {}).get(f"model.layers.{layer}.{name}", 4)
            found[f"{path}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
            found[f"{path}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 4
    return found


def projector(seed: int = 0) -> dict[str, torch.Tensor]:
    """A projector of the tiny LLaVA's widths, under the names in `non_lora_trainables.bin`."""
    generator = torch.Generator().manual_seed(100 + seed)
    shapes = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    return {
        f"base_model.model.model.mm_projector.{name}": torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }


def checkpoint(
    folder: Path,
    weights: Any = None,
    others: Any = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint folder as `llava/train/train.py` leaves it."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    torch.save(lora() if weights is None else weights, folder / "adapter_model.bin")
    torch.save(projector() if others is None else others, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "mm_projector_type": "mlp2x_gelu"}))
    return folder
