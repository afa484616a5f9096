"""Whether an adapter that is on a model can be merged, by what it trains there."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftConfig
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper, PeftWarning
from torch import nn

from ..families.linears import is_linear
from ..families.parts import find_projectors
from ..files.errors import UnmergeableAdapterError
from ..files.mergeable import check_mergeable
from ..files.peft_methods import has_no_layers, is_plain_lora
from .config import MAnyConfig
from .layers import adapted_layers


def warn_of_trouble(model: nn.Module, adapter_name: str, config: MAnyConfig, for_peft_model: bool) -> None:
    """Say of an adapter what stands in the way of merging it, if it is made for training, or that it is misplaced.

    `for_peft_model` says whether it was put on the model by PEFT, and not by transformers as a part of it.
    """
    if for_peft_model and config.is_merge and has_no_layers(config):
        warnings.warn(
            f"{getattr(config, 'loaded_from', 'The adapter')} is a part of a routed model, in whose weights its LoRA "
            "is: on another model it answers wrongly. Load it by `load_routed_model`.",
            PeftWarning,
            stacklevel=3,
        )
    if config.is_merge or config.inference_mode:
        return
    layers = adapted_layers(model, adapter_name).values()
    if not all(type(layer).__module__.startswith("peft.") for layer in layers):
        return  # of layers that people made themselves PEFT warns
    try:
        check_mergeable_on(model, adapter_name, config)
    except UnmergeableAdapterError as error:
        warnings.warn(f"{error} It can be trained and used all the same.", PeftWarning, stacklevel=3)


def check_mergeable_on(model: nn.Module, adapter_name: str, config: PeftConfig) -> None:
    """As `check_mergeable`, of an adapter on a base model."""
    layers = {
        name: _kind(layer, adapter_name, is_plain_lora(config))
        for name, layer in adapted_layers(model, adapter_name).items()
        if not isinstance(layer, TrainableTokensLayer)  # which the config speaks of
    }
    whole = [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for key in module.modules_to_save[adapter_name].state_dict()
    ]
    projectors = getattr(config, "projector_modules", None) or find_projectors(model)
    check_mergeable(f"Adapter '{adapter_name}'", config, layers, whole, projectors)


def _kind(layer: Any, adapter_name: str, is_plain: bool) -> str | None:
    """What a layer is if its adapter is no delta of a linear layer."""
    if is_plain:  # of a quantised layer, whose base layer may be of any class
        in_parts = isinstance(layer, (MultiheadAttention, ParamWrapper)) or adapter_name not in layer.lora_A
        is_suited = not in_parts and isinstance(layer.lora_A[adapter_name], nn.Linear)
    else:
        is_suited = is_linear(layer.get_base_layer())
    return None if is_suited else type(layer).__name__
