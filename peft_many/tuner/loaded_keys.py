"""The keys of an adapter that is loaded, under the names that the model's parts have today.

PEFT renames layers for its own LORA type only, and of projectors it requires the very names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..families.module_names import Names, names_on
from ..files.errors import MalformedAdapterError
from ..files.tensor_keys import KEY_PREFIX
from .layers import lora_layers
from .projector import ProjectorWrapper

# By `bias="all"` PEFT saves every bias by its path in the model as well: the trained copy's twice, and the base's.
_INSIDE_A_WRAPPER = ("modules_to_save.", "original_module.")


def with_current_keys(state_dict: Mapping[str, Tensor], model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter's file under today's names of layers and projectors, before PEFT adds adapter names.

    That a projector lacks a tensor under all names, those of the user's `key_mapping` too, is a `ValueError`.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names, adapted = names_on(base), _adapted(model, adapter_name)
    projectors = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, ProjectorWrapper) and adapter_name in module.looked_up
    }
    of_adapter = f"modules_to_save.{adapter_name}."
    renamed: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        layer = _layer(key)
        projector, rest = _projector_of(key, projectors, names)
        if layer is not None:
            renamed[key if layer in adapted else key.replace(layer, names(layer) or layer, 1)] = tensor
        elif projector is None:
            renamed[key] = tensor
        elif not (rest.startswith(_INSIDE_A_WRAPPER) and rest.endswith(".bias")):
            renamed[f"{KEY_PREFIX}{projector}.{of_adapter}{rest}"] = tensor
    for name, wrapper in projectors.items():
        wrapper.looked_up.discard(adapter_name)
        for rest in wrapper.modules_to_save[adapter_name].state_dict():
            if f"{KEY_PREFIX}{name}.{of_adapter}{rest}" not in renamed:
                raise ValueError(
                    f"The adapter trained the projector '{name}', but has no tensor '{KEY_PREFIX}{name}.{rest}': it "
                    "is not whole, or the projector had another name when it was saved (pass `key_mapping`)."
                )
    return renamed


def key_mapping(stored: Iterable[str], base: nn.Module) -> dict[str, str]:
    """PEFT's argument of that name: what the modules of an adapter's file are called in the base model today."""
    names, found = names_on(base), {}
    for key in stored:
        path = _layer(key) or key.removeprefix(KEY_PREFIX).rpartition(".")[0]
        if (now := names(path)) not in (path, None):
            found[rf"^{re.escape(path)}\."] = f"{now}."
    return found


def check_projectors_are_there(
    stored: Collection[str], base: nn.Module, expected: Mapping[str, Collection[str]], source: str
) -> None:
    """Refuse a weights file that lacks a tensor of a projector before the model is touched; without a file, nothing.

    `expected` are, by projector, the keys of its tensors. PEFT would say it by a bare `KeyError`.
    """
    names, keys = names_on(base), set()
    for key in stored:
        projector, rest = _projector_of(key, expected, names)
        keys.add(key if projector is None else f"{KEY_PREFIX}{projector}.{rest}")
    known = {key for of_one in expected.values() for key in of_one}
    # Tensors by other names may be these ones, and be renamed by the user's `key_mapping` when PEFT reads them.
    renamed = any(key not in known and ".lora_" not in key for key in keys)
    for projector, of_one in expected.items():
        missing = [key for key in of_one if key not in keys]
        has_some = any(f".{projector}." in f".{key}" for key in keys)
        if keys and missing and (has_some or not renamed):
            raise MalformedAdapterError(
                f"{source}: adapter_model.safetensors lacks the tensor '{missing[0]}' of the projector '{projector}', "
                "which its config says is trained: the file is incomplete; save or download the adapter again."
            )


def require_known(state_dict: Mapping[str, Tensor], model: nn.Module, adapter_name: str) -> None:
    """Raise `ValueError` naming a tensor that belongs to no part of the model."""
    adapted = _adapted(model, adapter_name)
    there = {key.removeprefix(KEY_PREFIX) for key in model.state_dict()}
    there |= {key.replace(f".{adapter_name}.", ".", 1) for key in there}  # PEFT adds the name where it does not stand
    for key in state_dict:
        path = key.removeprefix(KEY_PREFIX)
        # LoRA's variants have parts of their own beside `lora_A`, on layers that they adapt.
        if path not in there and path.rpartition(".lora_")[0] not in adapted:
            raise ValueError(
                f"The adapter's tensor '{key}' matches no module of {type(model).__name__}: it was trained on "
                "another base model, or on one whose modules had other names (pass `key_mapping`)."
            )


def _adapted(model: nn.Module, adapter_name: str) -> set[str]:
    return {name.removeprefix(KEY_PREFIX) for name in lora_layers(model, adapter_name)}


def _layer(key: str) -> str | None:
    """The path of the layer that one of LoRA's tensors belongs to; other tensors belong to none."""
    layer, _, rest = key.removeprefix(KEY_PREFIX).rpartition(".lora_")  # modules may be called "lora_..." too
    return layer if f"lora_{rest.partition('.')[0]}" in LoraLayer.adapter_layer_names else None


def _projector_of(key: str, projectors: Collection[str], names: Names) -> tuple[str | None, str]:
    """The projector that a tensor lies in, by its name then or now, and the rest of the path; LoRA's lie in none."""
    parts = [] if _layer(key) is not None else key.removeprefix(KEY_PREFIX).split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = names(".".join(parts[:length]))
        if name in projectors:
            return name, ".".join(parts[length:])
    return None, ""
