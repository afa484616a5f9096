"""An adapter's layers, and covariances on them, where a user looks for them: `layer.covariance[adapter_name]`."""

from __future__ import annotations

from operator import attrgetter

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..algebra.sums import CovarianceSum
from ..files.statistics import AdapterStatistics


def lora_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The layers that have a LoRA of that adapter, by their path in the base model."""
    layers = adapted_layers(model, adapter_name)
    return {name: layer for name, layer in layers.items() if isinstance(layer, LoraLayer)}


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, BaseTunerLayer]:
    """The layers that an adapter of any PEFT method has a part in, by their path in the base model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and has_adapter(module, adapter_name)
    }


def has_adapter(layer: BaseTunerLayer | AuxiliaryTrainingWrapper, adapter_name: str) -> bool:
    """Whether an adapter of any PEFT method has weights in a layer, or in a module that is trained whole."""
    parts = (attrgetter(name)(layer) for name in layer.adapter_layer_names)
    return any(adapter_name in part for part in parts if isinstance(part, (nn.ModuleDict, nn.ParameterDict)))


def hang_on_layers(model: nn.Module, adapter_name: str, statistics: AdapterStatistics) -> None:
    """Set `layer.covariance[adapter_name]` on every adapted layer that the statistics know.

    Plain objects on plain attributes: no buffers, so dtype casts, DDP and state dicts leave them alone. Layers of a
    merge get `R = Σ_t w_t C_t`. `delete_adapter` drops them with the adapter.
    """
    for name, layer in adapted_layers(model, adapter_name).items():
        found = [(task.weight, task.covariance_of(name)) for task in statistics.tasks]
        parts = [(weight, covariance) for weight, covariance in found if covariance is not None]
        if not parts:
            continue
        if not hasattr(layer, "covariance"):
            layer.covariance = {}
            # PEFT's list of per-adapter attributes, from which it deletes an adapter's entries.
            layer.other_param_names = (*layer.other_param_names, "covariance")
        summed = CovarianceSum(remainder=0.0, parts=tuple(parts))
        layer.covariance[adapter_name] = summed if len(statistics.tasks) > 1 else parts[0][1]
