"""What people use today: PEFT's `add_weighted_adapter`, from adapters on disk to the merged adapter on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from synthesise import KEY_PREFIX, WEIGHTS_NAME
from torch import Tensor, nn


def skeleton(shapes: Mapping[str, tuple[int, int]]) -> nn.Module:
    """A base model with nothing but the given linear layers, `(in, out)` by path, whose weights take no memory.

    Layers on the meta device would drag the adapters there with them; one zero, seen as a matrix, stays on the CPU.
    """
    model = nn.Module()
    for path, (inputs, outputs) in shapes.items():
        *parents, name = path.split(".")
        parent = model
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        layer = nn.Linear(inputs, outputs, bias=False, device="meta")
        layer.weight = nn.Parameter(torch.zeros(()).expand(outputs, inputs), requires_grad=False)
        parent.add_module(name, layer)
    return model


def merge_with_peft(
    combination_type: str, folders: Sequence[Path], output: Path, shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Load the adapters' weights for the given layers onto one model, add the merge and save that."""
    names = [f"task_{t}" for t in range(len(folders))]
    model = None
    for name, folder in zip(names, folders):
        config = LoraConfig.from_pretrained(folder)
        if model is None:
            model = get_peft_model(skeleton(shapes), config, name, low_cpu_mem_usage=True)
        else:
            model.add_adapter(name, config, low_cpu_mem_usage=True)
        set_peft_model_state_dict(model, read_weights(folder, shapes), name, low_cpu_mem_usage=True)
    assert model is not None
    model.add_weighted_adapter(
        names, [1.0] * len(names), "merged", combination_type=combination_type, density=0.5
    )  # `density` is read by TIES only
    model.save_pretrained(output, selected_adapters=["merged"], save_embedding_layers=False)


def read_weights(folder: Path, modules: Sequence[str] | Mapping[str, object]) -> dict[str, Tensor]:
    """The LoRA tensors of the given layers, by their key in the file."""
    keys = [f"{KEY_PREFIX}{module}.lora_{half}.weight" for module in modules for half in "AB"]
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        return {key: file.get_tensor(key) for key in keys}
