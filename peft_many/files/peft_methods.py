"""Which PEFT methods can be merged: those that add a delta to the weight of linear layers, told by their own tensors.

The delta itself is never computed here: PEFT's own layers do that (`bare_model.py`). DoRA is the one method that needs
the base weight for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from .errors import UnmergeableAdapterError

Shapes = Mapping[str, tuple[int, ...]]

# By PEFT type, and by the option that makes a LoRA another variant: how large the rank of a layer's delta can be, by
# the shapes of the layer's tensors in the file and the config; `None` where nothing but the layer's size limits it.
RANKS: dict[str, Callable[[Shapes, Any], int] | None] = {
    "ADALORA": lambda shapes, config: shapes["lora_A"][0],
    "C3A": None,
    "DELORA": lambda shapes, config: shapes["delora_A"][0],
    # The real part of a sum of n products of complex columns and rows.
    "FOURIERFT": lambda shapes, config: 2 * shapes["fourierft_spectrum"][0],
    "GRALORA": lambda shapes, config: config.gralora_k * config.r + config.hybrid_r,
    "LOHA": lambda shapes, config: shapes["hada_w1_b"][0] * shapes["hada_w2_b"][0],
    # The ranks of a Kronecker product's two factors multiply; each is stored whole or as a product `a b`.
    "LOKR": lambda shapes, config: math.prod(min(shape) for key, shape in shapes.items() if not key.endswith("_a")),
    "PVERA": lambda shapes, config: shapes["pvera_lambda_d"][0] // 2,  # means and variances
    "RANDLORA": None,
    "SHIRA": lambda shapes, config: shapes["shira_weight"][0],
    "SUPERTUNING": lambda shapes, config: shapes["supertuning_values"][0] + (config.r or 0),
    "UNILORA": lambda shapes, config: config.r,
    "VBLORA": lambda shapes, config: config.r,
    "VERA": lambda shapes, config: shapes["vera_lambda_d"][0],
    "WAVEFT": lambda shapes, config: shapes["waveft_spectrum"][0],
    "use_dora": None,
    "velora_config": lambda shapes, config: shapes["lora_A.weight"][0],
}
# Why not the others, of those that people try.
_MULTIPLIES = "multiplies weights or activations instead of adding to weights"
_PROMPTS = "adds virtual tokens and changes no layer"
_WHY_NOT = {
    **dict.fromkeys(("BOFT", "IA3", "OFT"), _MULTIPLIES),
    **dict.fromkeys(("P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"), _PROMPTS),
    "TRAINABLE_TOKENS": "trains rows of the embedding",
}
_WHY_NOT_IN_GENERAL = "is not known to add a delta to linear layers that can be told without the base model"


def name_of(config: PeftConfig) -> str:
    """The PEFT type, as PEFT writes it."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def has_no_layers(config: Any) -> bool:
    """Whether an adapter has no layers of its own: of merges, that inside a routed model (`export_routed_model`)."""
    return bool(getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES)


def is_plain_lora(config: PeftConfig) -> bool:
    """Whether the delta of a layer is `scaling · B A` of the two matrices in the file."""
    return name_of(config) in ("LORA", "MANY") and not _variants(config)


def described(config: PeftConfig) -> str:
    """What an adapter is, to go after its name."""
    options = [f"`{name}`" for name in _variants(config)]
    return f"uses {' and '.join(options)}" if options else f"is of PEFT type {name_of(config)}"


def check_method(config: PeftConfig, adapter: str) -> None:
    """Raise `UnmergeableAdapterError` if an adapter's PEFT method cannot be merged; `adapter` is how to call it."""
    method = _method(config)
    if not is_plain_lora(config) and method not in RANKS:
        why = _WHY_NOT.get(method, _WHY_NOT_IN_GENERAL)
        raise UnmergeableAdapterError(f"{adapter} {described(config)}, which {why}; it cannot be merged.")


def needs_base(config: PeftConfig) -> bool:
    """Whether the delta of a layer depends on the weight that it is added to."""
    return _method(config) == "use_dora"


def rank_bound(config: PeftConfig, shapes: Shapes, layer: tuple[int, int]) -> int:
    """What the rank of a layer's delta cannot exceed, by the shapes of the layer, `(out, in)`, and of its tensors."""
    rule = RANKS[_method(config)]
    return min(layer) if rule is None else max(1, min(rule(shapes, config), *layer))


def _method(config: PeftConfig) -> str:
    """The key of a config's method in the table; several LoRA variants at once have none."""
    return " and ".join(_variants(config)) or name_of(config)


def _variants(config: PeftConfig) -> list[str]:
    """The options that make an adapter another LoRA variant; none for a plain LoRA and for other methods."""
    if name_of(config) not in ("LORA", "MANY"):
        return []
    fields = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    return [name for name in fields if getattr(config, name, None)]
