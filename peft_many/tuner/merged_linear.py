"""The LoRA factors of a merge: they compute in the base model's half precision, and are saved as they were."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..algebra.devices import numbers_of
from ..algebra.half_precision import loses_little
from ..algebra.precision import without_autocast
from ..records import merge_of
from .layers import lora_layers

_HALVES = (torch.float16, torch.bfloat16)


class MergedLinear(nn.Linear):
    """A `lora_A` or `lora_B` of a merge, whose weights may be rounded for computing.

    A merge's rank is that of all its tasks together, and its products in float32 would cost a GPU a fifth of the whole
    model's. The exact weights wait in main memory, also where it is cast from outside: state dicts hold them, and
    `.float()` brings them back. Where the rounded ones were changed since, the changed ones count.
    """

    def __init__(self, factor: nn.Linear) -> None:
        super().__init__(factor.in_features, factor.out_features, bias=factor.bias is not None, device="meta")
        self.weight, self.bias = factor.weight, factor.bias
        self.rounded_to: torch.dtype | None = None
        self._exact: dict[str, Tensor] = {}  # of each parameter, on the CPU, while it is rounded

    def round_to(self, dtype: torch.dtype) -> None:
        """Compute in a dtype from now on."""
        self.rounded_to = dtype
        for name, parameter in self.named_parameters(recurse=False):
            self._exact[name] = parameter.detach().cpu()
            parameter.data = parameter.detach().to(dtype)

    def restore(self) -> None:
        """Compute with the exact weights again."""
        for name in self._exact:
            parameter = getattr(self, name)
            parameter.data = self.exact(name).to(parameter.device, torch.float32)
        self._exact, self.rounded_to = {}, None

    def exact(self, name: str = "weight") -> Tensor:
        """A parameter as it was before it was rounded, on the CPU; as it is now, where it is not."""
        parameter: Tensor = getattr(self, name).detach()
        exact = self._exact.get(name)
        if exact is None or parameter.is_meta:
            return parameter if exact is None else exact
        parameter = parameter.cpu()
        unchanged = exact.to(self.rounded_to).to(parameter.dtype) == parameter
        return exact if unchanged.all() else torch.where(unchanged, exact, parameter.to(exact.dtype))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination.update({prefix + name: self.exact(name) for name in self._exact})

    def _load_from_state_dict(self, *args: Any) -> None:
        dtype = self.rounded_to
        self.restore()
        super()._load_from_state_dict(*args)
        if dtype is not None:
            self.round_to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> MergedLinear:
        before = {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        dtype = self.weight.dtype
        if self.weight.is_meta or dtype == self.rounded_to:
            return self
        if self.rounded_to is None and dtype in _HALVES and before["weight"].dtype == torch.float32:
            self._exact = {name: tensor.cpu() for name, tensor in before.items() if not tensor.is_meta}
            self.rounded_to = dtype if self._exact else None
        elif self.rounded_to is not None:
            device = self.weight.device
            self.restore()
            self.to(device, dtype)
        return self


def exact_weight(factor: nn.Linear) -> Tensor:
    """The weight of a `lora_A` or `lora_B`, as it is saved."""
    return factor.exact().to(factor.weight.device) if isinstance(factor, MergedLinear) else factor.weight.detach()


def use_merged_linears(model: nn.Module, adapter_name: str) -> None:
    """Let the layers of a merge have factors that can be rounded."""
    for factors, factor in _factors(model, adapter_name):
        if type(factor) is nn.Linear:
            factors[adapter_name] = MergedLinear(factor)


@torch.no_grad()
@without_autocast()
def round_merge(model: nn.Module, adapter_name: str, config: PeftConfig) -> None:
    """Let a merge compute in the half precision of its base layers, where that loses little.

    Decided once, with one wait for each device. What is trained stays float32, and so does the merge of one adapter,
    which answers as that does; so do layers whose weights are elsewhere.
    """
    merge = merge_of(config)
    if merge is None or len(merge.tasks) < 2 or not config.inference_mode:
        return
    restore_merge(model, adapter_name)
    suited, verdicts = [], []
    for layer in lora_layers(model, adapter_name).values():
        dtype, pair = _dtype_of_base(layer), _pair(layer, adapter_name)
        if pair is None or dtype not in _HALVES or pair[0].weight.dtype in _HALVES:
            continue
        A, B = pair
        verdict = torch.stack([loses_little(weight, B.weight, dtype) for weight in A.parameters(recurse=False)]).all()
        suited.append((pair, dtype))
        verdicts.append(verdict)
    for (pair, dtype), (is_little,) in zip(suited, numbers_of(verdicts)):
        for factor in pair if is_little else ():
            factor.round_to(dtype)


def restore_merge(model: nn.Module, adapter_name: str) -> bool:
    """Let all layers of a merge compute with its exact weights; whether any did not."""
    factors = [factor for _, factor in _factors(model, adapter_name) if isinstance(factor, MergedLinear)]
    rounded = [factor for factor in factors if factor.rounded_to is not None]
    for factor in rounded:
        factor.restore()
    return bool(rounded)


def exact_weights(model: nn.Module, adapter_name: str, config: PeftConfig) -> ExitStack:
    """Make the weights of a merge exact, to be read and changed, until what is returned closes."""
    rounding = ExitStack()
    if restore_merge(model, adapter_name):
        rounding.callback(round_merge, model, adapter_name, config)
    return rounding


def _factors(model: nn.Module, adapter_name: str) -> list[tuple[nn.ModuleDict, nn.Module]]:
    layers = lora_layers(model, adapter_name).values()
    parts = [part for layer in layers for part in (layer.lora_A, layer.lora_B)]
    return [(part, part[adapter_name]) for part in parts if adapter_name in part]


def _pair(layer: LoraLayer, adapter_name: str) -> tuple[MergedLinear, MergedLinear] | None:
    """Both factors of a layer whose weights are here."""
    if adapter_name not in layer.lora_A:
        return None
    A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    both = isinstance(A, MergedLinear) and isinstance(B, MergedLinear)
    is_here = both and not any(type(p.data) is not Tensor or p.is_meta for p in (*A.parameters(), *B.parameters()))
    return (A, B) if is_here else None


def _dtype_of_base(layer: LoraLayer) -> torch.dtype | None:
    """What a base layer computes in; `None` where a quantised one does not say."""
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    return getattr(base, "compute_dtype", None)
