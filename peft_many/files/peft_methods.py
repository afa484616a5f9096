"""Which PEFT methods can be merged: those that add a delta to the weight of linear layers. One row each.

The delta itself is never computed here: PEFT's own layers do that (`bare_model.py`). A row says how large its rank can
be by the method's construction, and whether the base weight is needed to know it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class PeftMethod:
    """A PEFT method whose effect on a linear layer is a delta `ΔW`.

    Args:
        rank (`Callable[[Shapes, PeftConfig], int]`, *optional*):
            An upper bound of the delta's rank, from the shapes of the layer's tensors in the file, by their names
            after the layer's, and the config. `None` if there is none but that of the layer.
        needs_base (`bool`, defaults to `False`): Whether the delta depends on the weight that it is added to.
    """

    rank: Callable[[Shapes, Any], int] | None = None
    needs_base: bool = False


def _rank_of_kronecker(shapes: Shapes, config: Any) -> int:
    """The ranks of a Kronecker product's factors multiply; each is stored whole or as a product of two."""
    first, second = (
        min(shapes[f"lokr_{w}"] if f"lokr_{w}" in shapes else shapes[f"lokr_{w}_b"]) for w in ("w1", "w2")
    )
    return first * second


BY_PEFT_TYPE: dict[str, PeftMethod] = {
    "ADALORA": PeftMethod(lambda shapes, config: shapes["lora_A"][0]),
    "C3A": PeftMethod(),
    "DEFT": PeftMethod(lambda shapes, config: shapes["deft_P"][1], needs_base=True),
    "DELORA": PeftMethod(lambda shapes, config: shapes["delora_A"][0]),
    # The real part of a sum of n products of complex columns and rows.
    "FOURIERFT": PeftMethod(lambda shapes, config: 2 * shapes["fourierft_spectrum"][0]),
    "FROD": PeftMethod(needs_base=True),
    "GRALORA": PeftMethod(lambda shapes, config: config.gralora_k * config.r + config.hybrid_r),
    "HIRA": PeftMethod(needs_base=True),
    "LOHA": PeftMethod(lambda shapes, config: shapes["hada_w1_b"][0] * shapes["hada_w2_b"][0]),
    "LOKR": PeftMethod(_rank_of_kronecker),
    "MISS": PeftMethod(lambda shapes, config: shapes["miss_block"][0]),
    "OSF": PeftMethod(lambda shapes, config: 2 * shapes["osf_svd_params.S_low"][0], needs_base=True),
    "PEANUT": PeftMethod(lambda shapes, config: shapes["peanut_B.weight"][1], needs_base=True),
    "PSOFT": PeftMethod(lambda shapes, config: config.r, needs_base=True),
    "PVERA": PeftMethod(lambda shapes, config: shapes["pvera_lambda_d"][0] // 2),  # means and variances
    "RANDLORA": PeftMethod(),
    "SHIRA": PeftMethod(lambda shapes, config: shapes["shira_weight"][0]),
    "SUPERTUNING": PeftMethod(lambda shapes, config: shapes["supertuning_values"][0] + (config.r or 0)),
    "TINYLORA": PeftMethod(lambda shapes, config: shapes["tinylora_A"][0], needs_base=True),
    "UNILORA": PeftMethod(lambda shapes, config: config.r),
    "VBLORA": PeftMethod(lambda shapes, config: config.r),
    "VERA": PeftMethod(lambda shapes, config: shapes["vera_lambda_d"][0]),
    "WAVEFT": PeftMethod(lambda shapes, config: shapes["waveft_spectrum"][0]),
}
BY_LORA_VARIANT: dict[str, PeftMethod] = {
    "use_dora": PeftMethod(needs_base=True),
    "velora_config": PeftMethod(lambda shapes, config: shapes["lora_A.weight"][0]),
    "use_bdlora": PeftMethod(lambda shapes, config: _rank_of_blocks(shapes, config)),
}

_MULTIPLIES = "multiplies the base weight instead of adding a delta to it"
_PROMPTS = "adds virtual tokens and changes no layer"
WHY_NOT: dict[str, str] = {
    "ADAMSS": "changes the biases of layers too",
    "ADAPTION_PROMPT": _PROMPTS,
    "BEFT": "trains biases",
    "BOFT": _MULTIPLIES,
    "CARTRIDGE": _PROMPTS,
    "CPT": _PROMPTS,
    "GLORA": "changes the biases of layers too",
    "HRA": _MULTIPLIES,
    "IA3": "multiplies activations instead of adding a delta to a weight",
    "LILY": "adds something else to each token, chosen by a router",
    "LN_TUNING": "trains normalisation layers",
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "OFT": _MULTIPLIES,
    "P_TUNING": _PROMPTS,
    "POLY": "mixes several LoRAs by a task id that comes with the input",
    "PREFIX_TUNING": _PROMPTS,
    "PROMPT_TUNING": _PROMPTS,
    "ROAD": "multiplies activations instead of adding a delta to a weight",
    "SHADOW": "runs a second network beside the model and changes no layer",
    "TRAINABLE_TOKENS": "trains rows of the embedding",
    "XLORA": "mixes several LoRAs by a gate that reads the input",
}
WHY_NOT_VARIANT = {
    "monteclora_config": "samples its delta, and PEFT loads a part of what its file holds",
    "alora_invocation_tokens": "acts only on the tokens after its invocation",
    "arrow_config": "mixes several LoRAs by the input",
    "kasa_config": "changes the base weights before it adds to them",
}


def _rank_of_blocks(shapes: Shapes, config: Any) -> int:
    return max(shapes["lora_A.weight"][0], shapes["lora_B.weight"][1])


def name_of(config: PeftConfig) -> str:
    """The PEFT type, as PEFT writes it."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def variants(config: PeftConfig) -> list[str]:
    """The options that make an adapter another LoRA variant; none for a plain LoRA and for other methods."""
    if name_of(config) not in ("LORA", "MANY"):
        return []
    fields = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    return [name for name in fields if getattr(config, name, None)]


def is_plain_lora(config: PeftConfig) -> bool:
    """Whether the delta of a layer is `scaling · B A` of the two matrices in the file."""
    return name_of(config) in ("LORA", "MANY") and not variants(config)


def described(config: PeftConfig) -> str:
    """What an adapter is, to go after its name."""
    options = variants(config)
    return f"uses `{options[0]}`" if options else f"is of PEFT type {name_of(config)}"


def method_of(config: PeftConfig) -> PeftMethod:
    """How the deltas of an adapter that is no plain LoRA can be had.

    Raises:
        ValueError: They cannot; the message says why, to go after the adapter's name.
    """
    kind, options = name_of(config), variants(config)
    if options:
        if len(options) > 1:
            raise ValueError(f"combines the LoRA variants {' and '.join(f'`{option}`' for option in options)}")
        if options[0] in BY_LORA_VARIANT:
            return BY_LORA_VARIANT[options[0]]
        raise ValueError(f"uses `{options[0]}`, which {WHY_NOT_VARIANT.get(options[0], 'is unknown here')}")
    if kind == "MISS" and getattr(config, "init_weights", None) == "bat":
        raise ValueError(f"is of PEFT type MISS with `init_weights='bat'`, which {_MULTIPLIES}")
    if kind in BY_PEFT_TYPE:
        return BY_PEFT_TYPE[kind]
    raise ValueError(f"is of PEFT type {kind}, which {WHY_NOT.get(kind, 'is unknown here')}")


# Options whose effect is on more than the weight of linear layers.
_UNSUPPORTED_OPTIONS = (
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "megatron_config",
    "use_qalora",
)
# Initialisations that change the base weights: what is trained is then no delta on the original model.
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def check_options(config: PeftConfig, layer: str) -> None:
    """Refuse options by which an adapter does more than adding a delta to the weight of linear layers.

    Args:
        config ([`~peft.PeftConfig`]): The adapter's.
        layer (`str`): One of its layers, for messages.

    Raises:
        ValueError: The message is to go after the adapter's name.
    """
    for option in _UNSUPPORTED_OPTIONS:
        if getattr(config, option, None):
            raise ValueError(
                f"uses `{option}`, so its effect on '{layer}' is no plain low-rank delta and cannot be merged."
            )
    bias = getattr(config, "bias", "none")
    if bias not in ("none", False, None):
        raise ValueError(f"trains biases (`bias='{bias}'`), which cannot be merged.")
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith(_MUTATING_INITS):
        raise ValueError(
            f"was initialised with `init_lora_weights='{init}'`, which changes the base weights of '{layer}'. Convert "
            "it with `path_initial_model_for_weight_conversion` of `save_pretrained`, load the result on the base "
            "model as it was, and run `collect_statistics` again."
        )


def as_lora(config: LoraConfig) -> LoraConfig:
    """The same adapter under PEFT's own LORA type, of which MANY is an extension."""
    kept = [field.name for field in dataclasses.fields(LoraConfig) if field.init and field.name != "peft_type"]
    return LoraConfig(**{name: getattr(config, name) for name in kept})
