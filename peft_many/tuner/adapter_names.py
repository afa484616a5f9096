"""What an adapter may be called inside a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..records import INSTRUCTION_ROUTER

# Parts of the names of tensors that adapters add.
_OF_ADAPTERS = {"base_layer", "base_model", "experts", "lora_A", "lora_B", "modules_to_save", "original_module"}
_OF_ADAPTERS |= {INSTRUCTION_ROUTER, "prototypes", "directions", "variances"}


def trouble_with(name: Any, model: nn.Module) -> str | None:
    """What goes wrong with a name, because PEFT tells the adapters of a model apart by parts of their tensors' names.

    Raises:
        ValueError: No module can be called so.
    """
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"`adapter_name` must be a name without a dot, such as 'v1_5', but it is {name!r}.")
    names = (key.split(".") for key, _ in model.named_parameters(remove_duplicate=False))
    if name not in _OF_ADAPTERS and not any(name in parts for parts in names):
        return None
    return (
        f"`adapter_name` should not be '{name}': tensors of the model are called so too, and PEFT leaves them out "
        "when it saves another adapter beside this one."
    )
