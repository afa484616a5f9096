"""Which layers of a model get a LoRA, where the config does not say or says it in older names."""

from __future__ import annotations

import copy
import re

from peft import LoraConfig, PeftType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from ..families.family import Parts
from ..families.parts import language_model_linears
from .config import MAnyConfig, MAnyPeftType


def default_targets(model: PreTrainedModel, config: MAnyConfig, parts: Parts | None) -> str | set[str]:
    """`target_modules` for all linear layers of the language model: the shortest form that matches them exactly."""
    if parts is not None and parts.language_model is None:
        raise ValueError(
            f"Cannot tell the language model of {type(model).__name__} from the rest: {parts.doubt} "
            "Please specify `target_modules` in the config."
        )
    wanted = set(language_model_linears(model, parts))
    last = {name.rpartition(".")[2] for name in wanted}
    if config.layers_to_transform is not None:
        # PEFT selects layers only among names that match by their end, which may match the vision tower too.
        by_layer = LoraConfig(
            target_modules=list(last),
            layers_to_transform=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
        )
        return {name for name in wanted if check_target_module_exists(by_layer, name)}
    names = [name for name, _ in model.named_modules()]
    if wanted == {name for name in names if name.rpartition(".")[2] in last}:
        return last
    decoder = parts.language_model if parts is not None and parts.language_model else ""
    pattern = rf"{re.escape(decoder)}\..*\b(?:{'|'.join(sorted(map(re.escape, last)))})"
    return pattern if wanted == {name for name in names if re.fullmatch(pattern, name)} else wanted


def update_expert_names(config: MAnyConfig, model: nn.Module) -> None:
    """Let PEFT turn expert names from before transformers v5 into `target_parameters`, which it does for LORA only.

    Names that the model has today stay: experts that all tokens pass have the names that routed ones had.
    """
    before, targeted = copy.deepcopy(config), _targeted(config, model)
    config.peft_type = PeftType.LORA
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    finally:
        config.peft_type = MAnyPeftType.MANY
    if not targeted <= _targeted(config, model):
        for name in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
            setattr(config, name, getattr(before, name))


def _targeted(config: MAnyConfig, model: nn.Module) -> set[str]:
    """The linear layers that the config's `target_modules` match, by what they are called in PEFT's eyes."""
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name for name in names if config.target_modules and check_target_module_exists(config, name)}
