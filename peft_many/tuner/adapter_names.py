"""What an adapter may be called inside a model."""

from __future__ import annotations

from typing import Any

from torch import nn

# Parts of the names of tensors that adapters add.
_OF_ADAPTERS = {"base_layer", "base_model", "experts", "lora_A", "lora_B", "modules_to_save", "original_module"}


def check_adapter_name(name: Any, model: nn.Module) -> None:
    """Refuse names that modules cannot have, or with which saving would lose tensors."""
    check_possible(name)
    if eats_weights(name, model):
        raise ValueError(
            f"`adapter_name` cannot be '{name}': tensors of the model are called so too, and PEFT would leave them "
            "out when it saves another adapter."
        )


def check_possible(name: Any) -> None:
    """Refuse what no module can be called, before a model is wrapped."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"`adapter_name` must be a name without a dot, such as 'v1_5', but it is {name!r}.")


def eats_weights(name: str, model: nn.Module) -> bool:
    """Whether the name is a part of a tensor's name, by which PEFT tells the adapters of a model apart."""
    return name in _OF_ADAPTERS or any(
        name in key.split(".") for key, _ in model.named_parameters(remove_duplicate=False)
    )
