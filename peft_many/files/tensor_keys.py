"""What the tensors in an adapter's file belong to, told by their keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peft import PeftConfig
from torch import Tensor

from ..records import INSTRUCTION_ROUTER
from .fingerprints import tensors_fingerprint
from .upstream import prefix_of

KEY_PREFIX = "base_model.model."  # PEFT's, of every tensor that belongs to a module of the base model
TASK_WEIGHT = "lora_A.task_weight"  # of a layer of a merge with `gate_lora`: the tasks' own `A_t`, stacked
# Of tensors that are not whole; what to do about it.
SHARDED = (
    "the file was saved from weights that are sharded over processes (DeepSpeed ZeRO-3, FSDP): save it again from "
    "gathered ones, as `accelerator.get_state_dict` gives (ZeRO-3: with `stage3_gather_16bit_weights_on_model_save`)"
)


def lora_key(layer: str, half: str) -> str:
    """What a layer's `lora_A` or `lora_B` is called in a file; `half` is `"A"` or `"B"`."""
    return f"{KEY_PREFIX}{layer}.lora_{half}.weight"


@dataclass(frozen=True)
class TensorKeys:
    """The keys of an adapter's tensors, sorted, by what they belong to."""

    own: dict[str, list[str]]  # by layer
    shared: list[str]  # to all layers
    rest: list[str]  # to modules that are saved whole

    def of_layer(self, module: str) -> list[str]:
        """The keys of all tensors that the delta of a layer may depend on."""
        return [*self.own.get(module, []), *self.shared]


def tensor_keys(config: PeftConfig, keys: Iterable[str]) -> TensorKeys:
    """Tell the tensors of an adapter apart by PEFT's prefix of the method."""
    found = TensorKeys({}, [], [])
    for key in sorted(keys):
        layer = key.removeprefix(KEY_PREFIX).rpartition(f".{prefix_of(config)}")[0]
        if key.startswith(f"{KEY_PREFIX}{INSTRUCTION_ROUTER}."):
            continue  # made anew by each merge, of the tasks' statistics
        if not key.startswith(KEY_PREFIX):
            found.shared.append(key)
        elif layer:
            found.own.setdefault(layer, []).append(key)
        else:
            found.rest.append(key)
    return found


def fingerprint_of(tensors: Mapping[str, Tensor], keys: TensorKeys, module: str) -> list[float]:
    """What tells whether the tensors behind a layer's delta are still the same."""
    return tensors_fingerprint([tensors[key] for key in keys.of_layer(module)])
