"""Which adapter and layers of a model are to be measured, whether they can be, and what the weights are meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import align_module_device, extract_model_from_parallel
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import PeftWarning
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from ..algebra.lpm import LowRankDelta
from ..families.linears import features_of_linear
from ..files.fingerprints import weight_fingerprint
from ..files.peft_methods import is_plain_lora
from ..files.tensor_keys import KEY_PREFIX, fingerprint_of, tensor_keys
from ..tuner.batch_norms import drifting_batch_norms
from ..tuner.config import MAnyConfig
from ..tuner.layers import adapted_layers
from ..tuner.mergeable import check_mergeable_on


@dataclass(frozen=True)
class AdapterWeights:
    """What is to be known of an adapter's weights, by layer."""

    fingerprints: Mapping[str, list[float]]  # which tell whether the weights change later
    deltas: Mapping[str, LowRankDelta] = field(default_factory=dict)  # of plain LoRA adapters
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # (out, in), where files may not tell


def is_sharded(model: nn.Module, across_processes: bool) -> bool:
    """Whether the model's weights lie in pieces in several processes; a `ValueError` if they cannot be measured so."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "FSDP1 flattens weights and renames layers, so that nothing can be measured under it. Shard by FSDP2 "
            "(`fsdp_version: 2`; in `TrainingArguments`, `fsdp_config={'version': 2}`), or save the adapter, load it "
            "on a whole model and measure it there."
        )
    # By FSDP2 and tensor parallelism, and by ZeRO-3.
    sharded = any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())
    if sharded and not across_processes:
        raise ValueError(
            "The model's weights are sharded over processes, which all take part in each forward pass: let all of "
            "them make this call, without `across_processes=False`."
        )
    return sharded


def weights_of(model: Any, adapter_name: str, layers: Mapping[str, Any]) -> AdapterWeights:
    """The weights of an adapter's layers as they are now, gathered if they are sharded: all processes must ask."""
    # What may be sharded is all but the base layers. Nothing is changed, so that no process has to tell the others.
    own = [
        p for layer in layers.values() for name, p in layer.named_parameters() if not name.startswith("base_layer.")
    ]
    with gather_params_ctx(own, modifier_rank=None):
        return _weights_of(model, adapter_name, layers)


def _weights_of(model: Any, adapter_name: str, layers: Mapping[str, Any]) -> AdapterWeights:
    config = model.peft_config[adapter_name]
    if is_plain_lora(config):
        deltas = {name: _delta_of(name, layer, adapter_name) for name, layer in layers.items()}
        return AdapterWeights({name: weight_fingerprint(delta.A, delta.B) for name, delta in deltas.items()}, deltas)
    # Under the names that they will have in the file.
    saved: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {
        key if key.startswith("base_model.") else f"{KEY_PREFIX}{key}": whole(value) for key, value in saved.items()
    }
    away = next((key for key, tensor in tensors.items() if tensor.is_meta), None)
    if away is not None:
        raise RuntimeError(
            f"The adapter's tensor '{away}' is offloaded. Measure it on a model that keeps it in memory."
        )
    keys = tensor_keys(config, tensors)
    prints = {name: fingerprint_of(tensors, keys, name) for name in layers}
    shapes = {
        name: (features_of_linear(layer, 0) or 0, features_of_linear(layer, 1) or 0) for name, layer in layers.items()
    }
    return AdapterWeights(prints, shapes=shapes)


def _delta_of(name: str, layer: Any, adapter_name: str) -> LowRankDelta:
    """A layer's LoRA weights as they are now."""
    parts = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    with align_module_device(parts[0]), align_module_device(parts[1]):  # where Accelerate has offloaded them
        A, B = (part.weight.detach() for part in parts)
    A, B = whole(A), whole(B)
    if A.dim() != 2 or B.dim() != 2 or 0 in (A.numel(), B.numel()):
        raise RuntimeError(
            f"The LoRA weights of '{name}' are sharded over processes (their shapes here are {tuple(A.shape)} and "
            f"{tuple(B.shape)}). Save the adapter, load it on a model that is not sharded, or that FSDP2 shards, and "
            "measure it there."
        )
    return LowRankDelta(A=A, B=B)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 has cut into shards."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def unwrapped(model: Any) -> Any:
    """The model with adapters, out of what compiles or distributes it."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be a model with adapters, not a {type(model).__name__}; data come second.")
    return extract_model_from_parallel(model, keep_torch_compile=False)


def base_of(model: Any) -> nn.Module:
    """The base model that an adapter is on, with PEFT's layers in it."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def adapter_to_measure(model: Any, adapter_name: str | None) -> str:
    """The adapter's name, the active one if none is given; a `ValueError` if it cannot be measured."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise ValueError(f"{type(model).__name__} has no adapters; wrap it with `get_peft_model` first.")
    if adapter_name is None:
        active = model.active_adapters
        active = active() if callable(active) else active  # transformers has a method, PEFT a property
        if len(active) != 1:
            raise ValueError(f"Exactly one adapter is measured at a time, but {active} are active; give adapter_name.")
        adapter_name = active[0]
    if not isinstance(adapter_name, str) or adapter_name not in configs:
        raise ValueError(f"There is no adapter {adapter_name!r}; the model has {sorted(configs)}.")
    config = configs[adapter_name]
    if isinstance(config, MAnyConfig) and config.is_merge:
        raise ValueError(f"Adapter '{adapter_name}' is a merge; it carries the statistics of its tasks already.")
    base = base_of(model)
    check_mergeable_on(base, adapter_name, config)
    if not adapted_layers(base, adapter_name):
        raise ValueError(f"Adapter '{adapter_name}' has no layers to measure.")
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and {*module.merged_adapters} - {adapter_name}:
            raise ValueError(f"Other adapters are merged into '{name}'; call `unmerge_adapter()` first.")
    _warn_of_drift(base)
    return adapter_name


def _warn_of_drift(base: nn.Module) -> None:
    """Warn of batch norms whose running statistics training may have moved; adapters of type MANY keep them."""
    moving = drifting_batch_norms(base)
    if moving:
        warnings.warn(
            f"The frozen batch norm '{moving[0]}' is in training mode. Wherever it was so in training, its running "
            "statistics have moved, and the tasks' adapters no longer share one base model. Keep it in evaluation "
            "mode (`eval()` after each `train()`); a `MAnyConfig` adapter does so.",
            PeftWarning,
            stacklevel=6,
        )


def further_layers(names: Iterable[str], also_measure: Sequence[str] | str | None) -> set[str]:
    """The layers that `also_measure` asks for, with the meaning of PEFT's `target_modules`."""
    if also_measure is None:
        return set()
    if also_measure == "all-linear":
        return set(names)
    wanted = LoraConfig(target_modules=also_measure if isinstance(also_measure, str) else list(also_measure))
    found = {name for name in names if check_target_module_exists(wanted, name)}
    if not found:
        raise ValueError(f"`also_measure={also_measure!r}` matches no linear layer of the language model.")
    return found
