"""Whether an adapter can be merged, and if not why: the same words when it is made, measured, planned and merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from peft import PeftConfig

from .errors import UnmergeableAdapterError
from .peft_methods import check_method
from .projectors import projector_of
from .tensor_file import TensorFile
from .tensor_keys import KEY_PREFIX, SHARDED, TensorKeys

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


def check_mergeable(
    adapter: str,
    config: PeftConfig,
    layers: Mapping[str, str | None],
    whole: Iterable[str] = (),
    projectors: Sequence[str] = (),
) -> None:
    """Raise `UnmergeableAdapterError` if an adapter does more than adding deltas to the weights of linear layers.

    Args:
        adapter (`str`): How to call it.
        config ([`~peft.PeftConfig`]): Its config, of any PEFT method.
        layers (`Mapping[str, str | None]`): By adapted layer, what it is if it is no linear layer.
        whole (`Iterable[str]`): The tensors of modules that it trains whole, which only projectors may be.
        projectors (`Sequence[str]`): The modules that are known to be projectors.
    """
    check_method(config, adapter)
    strange = {name: kind for name, kind in layers.items() if kind is not None}
    _check_options(config, adapter, min(strange or layers, default="no layer"))
    for name, kind in strange.items():
        raise UnmergeableAdapterError(
            f"{adapter} adapts '{name}', which is no linear layer ({kind}); only linear layers can be merged."
        )
    for key in whole:
        projector_of(adapter, config, key, projectors)


def layers_in_file(weights: TensorFile, keys: TensorKeys) -> dict[str, str | None]:
    """The layers that an adapter has tensors for, each with what it is if these tell that it is no linear one."""
    return {module: _kind(module, own, weights) for module, own in keys.own.items()}


def _kind(module: str, own: Iterable[str], weights: TensorFile) -> str | None:
    for key in own:
        name, shape = key.removeprefix(f"{KEY_PREFIX}{module}."), weights.shape(key)
        if name.startswith("lora_embedding_"):
            return f"tensor '{module}.{name}'"
        if name in ("lora_A.weight", "lora_B.weight") and len(shape) != 2:
            return f"LoRA shape {shape}" + ("" if len(shape) > 2 else f"; if it is one, {SHARDED}")
    return "a part of another adapted module" if ".base_layer." in f"{module}." else None


def _check_options(config: PeftConfig, adapter: str, layer: str) -> None:
    """`layer` is one of its layers, for messages."""
    for option in _UNSUPPORTED_OPTIONS:
        if getattr(config, option, None):
            raise UnmergeableAdapterError(
                f"{adapter} uses `{option}`, so its effect on '{layer}' is no plain low-rank delta and cannot be "
                "merged; train it without this option."
            )
    bias = getattr(config, "bias", "none")
    if bias not in ("none", False, None):
        raise UnmergeableAdapterError(f"{adapter} trains biases (`bias='{bias}'`), which cannot be merged.")
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise UnmergeableAdapterError(
            f"{adapter} was initialised with `init_lora_weights='{init}'`, which changes the base weights of "
            f"'{layer}', so it cannot be merged as it is. Convert it with `path_initial_model_for_weight_conversion` "
            "of `save_pretrained`, load the result on the base model as it was, and run `collect_statistics` on that."
        )
