"""Dense deltas by PEFT's own layers: an adapter on a model that has nothing but the linear layers it adapts."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .peft_methods import name_of

_ADAPTER = "default"


@dataclass(frozen=True)
class BareLinear:
    """A linear layer without its model."""

    shape: tuple[int, int]  # (out, in)
    weight: Tensor | None = None  # the base weight as the layer stores it; zero if not given
    is_conv1d: bool = False  # transformers' `Conv1D`, whose weight is transposed

    def build(self) -> nn.Module:
        """The layer; one without a base weight takes no memory."""
        out, width = self.shape
        with torch.device("meta"):
            layer: nn.Module = Conv1D(out, width) if self.is_conv1d else nn.Linear(width, out, bias=False)
        stored = (width, out) if self.is_conv1d else (out, width)
        weight = torch.zeros(()).expand(stored) if self.weight is None else self.weight.detach()
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.register_parameter("bias", None)
        return layer


def bare_model(config: PeftConfig, tensors: Mapping[str, Tensor], linears: Mapping[str, BareLinear]) -> PeftModel:
    """An adapter on bare linear layers, whose tensors stay where they are until a delta is asked for.

    `linears` are all layers that it adapts, in the order of the model; `tensors` those of its file that do not belong
    to modules saved whole. What does not fit together is a `ValueError`.
    """
    root = nn.Module()
    for path, linear in linears.items():
        *parents, name = path.split(".")
        parent = root
        for step in parents:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(name, linear.build())
    # PEFT looks into AdaLoRA's weights to cut them to the ranks that are left, so that these must be in memory.
    later = name_of(config) != "ADALORA"
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a user of the adapter would have to know; here nothing is trained
        try:
            model = get_peft_model(root, _for_bare_layers(config, list(linears)), _ADAPTER, low_cpu_mem_usage=later)
            loaded = set_peft_model_state_dict(model, dict(tensors), _ADAPTER, low_cpu_mem_usage=later)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())  # PEFT's and torch's have many lines
            raise ValueError(f"PEFT cannot load it ({type(error).__name__}: {reason})") from error
    if loaded.unexpected_keys:
        raise ValueError(f"its tensor '{loaded.unexpected_keys[0]}' belongs to no part of such an adapter")
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if not later:
        missing = [name for name in loaded.missing_keys if ".lora_" in name]
    if missing:
        raise ValueError(f"its tensor '{missing[0].replace(f'.{_ADAPTER}', '')}' is missing")
    return model.eval()


def dense_delta(model: PeftModel, module: str, linear: BareLinear) -> Tensor:
    """What merging the adapter would add to the weight of a layer, `ΔW` of shape `(out, in)`, float64."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = copy.deepcopy(model.get_base_model().get_submodule(module)).double()
        weight = layer.get_base_layer().weight
        weight.data = weight.data.contiguous()
        before = weight.data.clone()
        layer.merge(adapter_names=[_ADAPTER])
        delta = layer.get_base_layer().weight.data.double() - before
    return delta.T if linear.is_conv1d else delta


def _for_bare_layers(config: PeftConfig, layers: list[str]) -> PeftConfig:
    """The config without what concerns the rest of the model."""
    if name_of(config) == "MANY":  # an extension of LoRA; these layers need none of it
        kept = [field.name for field in dataclasses.fields(LoraConfig) if field.init and field.name != "peft_type"]
        config = LoraConfig(**{name: getattr(config, name) for name in kept})
    config = copy.copy(config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # every weight gets loaded; others look at the model or at data
    for name in ("modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type"):
        if hasattr(config, name):
            setattr(config, name, None)
    config.base_model_name_or_path = config.revision = config.auto_mapping = None
    config.target_modules = layers
    config.inference_mode = True
    return config
