"""Where multimodal models keep their parts: the language model's linear layers and the projectors."""

from __future__ import annotations

import re

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# The last path component of a projector, by the names that transformers' families use (there is no public API for it).
PROJECTOR_NAME = re.compile(
    r"multi_modal_projector|mm_projector|projector|connector|merger|deepstack_merger_list|aligner|"
    r"language_projection|vision_projection"
)


def image_encoder_name(model: nn.Module) -> str | None:
    """The path of the vision tower of a transformers model, or `None` where images play no part."""
    if not isinstance(model, PreTrainedModel):
        return None
    encoder = model.get_encoder(modality="image")
    if encoder is model:
        return None
    return _name_of(model, encoder)


def language_model_name(model: nn.Module) -> str | None:
    """The path of the language model inside a multimodal transformers model, `None` if it is not a part of its own."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    return None if decoder is model else _name_of(model, decoder)


def text_encoder(model: nn.Module) -> nn.Module | None:
    """The text encoder of an encoder-decoder model, `None` for all other models."""
    if not isinstance(model, PreTrainedModel) or not getattr(model.config, "is_encoder_decoder", False):
        return None
    encoder: nn.Module = model.get_encoder()
    return None if encoder is model else encoder


def find_projectors(model: nn.Module) -> list[str]:
    """The paths of the modules that turn vision features into tokens; several where a family has several.

    A `ModuleList` of projectors (Qwen3-VL's deepstack mergers) counts as its members. Empty for models without images.
    """
    if image_encoder_name(model) is None:
        return []
    language_model = language_model_name(model)
    found: list[str] = []
    for name, module in model.named_modules():
        inside = [*found, *([language_model] if language_model else [])]
        if any(name == outer or name.startswith(f"{outer}.") for outer in inside):
            continue
        if PROJECTOR_NAME.fullmatch(name.rpartition(".")[2]):
            found += [f"{name}.{i}" for i in range(len(module))] if isinstance(module, nn.ModuleList) else [name]
    return found


def match_projectors(model: nn.Module, wanted: list[str]) -> list[str]:
    """The paths that end with the given names, as `modules_to_save` matches them.

    Raises:
        ValueError: A name matches no module, or a part of another projector.
    """
    names = [name for name, _ in model.named_modules()]
    found: list[str] = []
    for suffix in wanted:
        matches = [name for name in names if name == suffix or name.endswith(f".{suffix}")]
        if not matches:
            raise ValueError(
                f"`projector_modules` names '{suffix}', but no module of {type(model).__name__} ends with that name."
            )
        found += [name for name in matches if name not in found]
    wrapped = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    for outer in [*found, *wrapped]:
        inner = next((name for name in found if name.startswith(f"{outer}.")), None)
        if inner is not None:
            raise ValueError(f"`projector_modules` names '{inner}', which is a part of the projector '{outer}'.")
    return found


def language_model_linears(model: nn.Module) -> list[str]:
    """The paths of all linear layers of the language model, adapted or not, without the output head.

    Where images play no part, that is the whole model. Modules trained whole (`modules_to_save`) are left out.

    Raises:
        ValueError: The language model of a multimodal model cannot be told apart from the rest.
    """
    prefix, head = "", None
    if isinstance(model, PreTrainedModel):
        head = model.get_output_embeddings()
    if image_encoder_name(model) is not None:
        language_model = language_model_name(model)
        if language_model is None:
            raise ValueError(
                f"Cannot find the language model inside {type(model).__name__} (`get_decoder()` returns no part of "
                "it). Please specify `target_modules` in the config."
            )
        prefix = f"{language_model}."
    found: list[str] = []
    closed: list[str] = []
    for name, module in model.named_modules():
        if not name.startswith(prefix) or name.startswith(tuple(closed)):
            continue
        if module is head or isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            closed.append(f"{name}.")
        if module is head:
            continue
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if _is_linear(module):
            found.append(name)
    return found


def _is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer, be it quantised; attention layers of a `LinearAttention` class are none."""
    return isinstance(module, (nn.Linear, Conv1D)) or (
        "Linear" in type(module).__name__ and hasattr(module, "in_features")
    )


def _name_of(model: nn.Module, part: nn.Module) -> str | None:
    return next((name for name, module in model.named_modules() if module is part), None)
