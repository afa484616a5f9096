"""What the merge is compared with: the mean of the adapters, and adapters with somebody else's projector."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn


def averaged(base: nn.Module, folders: list[Path]) -> PeftModel:
    """The plain mean of task adapters: of their weight changes `ΔW_t`, exactly, and of their projectors' weights.

    The mean of `T` deltas of rank `r` is a delta of rank `T r`: the `A_t` stacked, and the `B_t / T` side by side.
    """
    config = PeftConfig.from_pretrained(str(folders[0]))
    tasks = [load_file(folder / SAFETENSORS_WEIGHTS_NAME) for folder in folders]
    tensors: dict[str, Tensor] = {}
    for key in tasks[0]:
        parts = [task[key] for task in tasks]
        if ".lora_A." in key:
            tensors[key] = torch.cat(parts)
        elif ".lora_B." in key:
            tensors[key] = torch.cat(parts, dim=1) / len(parts)
        else:
            tensors[key] = torch.stack(parts).mean(0)
    mean = LoraConfig(
        r=config.r * len(folders),
        lora_alpha=config.lora_alpha * len(folders),
        target_modules=config.target_modules,
        modules_to_save=config.modules_to_save,
    )
    model = get_peft_model(base, mean)
    set_peft_model_state_dict(model, tensors)
    return model.eval()


def with_projector_of(base: nn.Module, lora: Path, projector: Path) -> PeftModel:
    """The language-model LoRA of one adapter together with the projector of another."""
    model = PeftModel.from_pretrained(base, lora)
    own, other = (load_file(folder / SAFETENSORS_WEIGHTS_NAME) for folder in (lora, projector))
    mixed = {key: own[key] if ".lora_" in key else other[key] for key in own}
    set_peft_model_state_dict(model, mixed)
    return model.eval()
