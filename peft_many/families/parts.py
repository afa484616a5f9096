"""Where multimodal models keep their parts: the language model's linear layers and the projectors."""

from __future__ import annotations

import inspect
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .family import family_of
from .linears import is_linear

# What the arguments of `forward` that take images are called in transformers: `pixel_values`, `flattened_patches`, ...
_WORDS_FOR_IMAGES = ("pixel", "image", "patch")


def takes_images(model: nn.Module) -> bool:
    """Whether it is a transformers model that reads text and images, or videos."""
    if not isinstance(model, PreTrainedModel):
        return False
    if "vision_config" in model.config.sub_configs:  # in transformers 5.19 not every family claims what it reads
        return True
    claimed = model.input_modalities
    # The text-only models of a family (`Llama4ForCausalLM`) inherit the claim of the family as a whole.
    arguments = " ".join(inspect.signature(type(model).forward).parameters)
    reads_images = any(word in arguments for word in _WORDS_FOR_IMAGES)
    return "text" in claimed and ("image" in claimed or "video" in claimed) and reads_images


def image_encoder_name(model: nn.Module) -> str | None:
    """The path of the vision tower of a transformers model, or `None` where there is none."""
    if not isinstance(model, PreTrainedModel):
        return None
    encoder: Any = model.get_encoder(modality="image")
    for_text: Any = text_encoder(model)
    if encoder is for_text:  # it reads images and text; the tower is a part of it
        encoder = for_text.get_encoder(modality="image")
    return None if encoder is model else _name_of(model, encoder)


def language_model_name(model: nn.Module) -> str | None:
    """The path of the language model inside a multimodal transformers model, `None` if it is not a part of its own."""
    if (registered := family_of(model).language_model) is not None:
        return registered
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

    They are what lies between the vision tower and the language model. Where nothing does, they are those parts of the
    tower that end in the language model's width. A `ModuleList` of projectors (Qwen3-VL's deepstack mergers) counts as
    its members. Empty for models without images.
    """
    if not takes_images(model):
        return []
    named = family_of(model).projectors
    if named:
        paths = [(name, _from_the_end(model, name)) for name, _ in model.named_modules()]
        return [name for name, other in paths if any(_ends(name, end) or _ends(other, end) for end in named)]
    encoder, language_model = image_encoder_name(model), language_model_name(model)
    if language_model is None or _is_inside(encoder, language_model):
        return []
    between = _projectors_between(model, encoder, language_model)
    return between or ([] if encoder is None else _projectors_inside(model, encoder))


def where_projectors_are_sought(model: nn.Module) -> str:
    """What `find_projectors` looked for, in words."""
    return (
        "a module with weight matrices that lies between the vision tower `get_encoder(modality='image')` "
        f"({_quoted(image_encoder_name(model))}) and the language model `get_decoder()` "
        f"({_quoted(language_model_name(model))}) was looked for, and then a part of the tower that ends in the "
        "language model's width."
    )


def _quoted(path: str | None) -> str:
    return "no part of it" if path is None else f"'{path}'"


def _projectors_between(model: PreTrainedModel, encoder: str | None, language_model: str) -> list[str]:
    """The modules with weight matrices beside the vision tower and the language model, below what holds both."""
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    found: list[str] = []
    for holder in _holders(encoder, language_model):
        for name, child in model.get_submodule(holder).named_children():
            path = f"{holder}.{name}".removeprefix(".")
            holds_an_end = _is_inside(encoder, path) or _is_inside(language_model, path)
            if holds_an_end or any(child is end for end in ends):
                continue
            if isinstance(child, nn.ModuleList):
                found += [f"{path}.{i}" for i, member in enumerate(child) if _may_project(member)]
            elif _may_project(child):
                found.append(path)
    return found


def _holders(encoder: str | None, language_model: str) -> list[str]:
    """The smallest module that holds both ends, and those inside it that hold the vision tower."""
    if encoder is None:
        return [language_model.rpartition(".")[0]]
    path = encoder.split(".")[:-1]
    holders = [".".join(path[:length]) for length in range(len(path) + 1)]
    common = max(i for i, holder in enumerate(holders) if not holder or language_model.startswith(f"{holder}."))
    return holders[common:]


def _projectors_inside(model: PreTrainedModel, encoder: str) -> list[str]:
    """The parts of the vision tower that end in the language model's width, and lists of more such parts."""
    width = model.config.get_text_config().hidden_size
    tower = model.get_submodule(encoder)
    found = {
        name: type(_plain(child))
        for name, child in tower.named_children()
        if not isinstance(child, nn.ModuleList) and _may_project(child) and _last_width(child) == width
    }
    members = [
        f"{name}.{i}"
        for name, child in tower.named_children()
        if isinstance(child, nn.ModuleList)
        for i, member in enumerate(child)
        if type(_plain(member)) in found.values()
    ]
    return [f"{encoder}.{name}" for name in [*found, *members]]


def _may_project(module: nn.Module) -> bool:
    """Whether it holds a weight matrix, and is no model of its own, such as another tower or a Q-Former."""
    matrices = any(parameter.dim() == 2 for parameter in module.parameters())
    return matrices and not isinstance(_plain(module), PreTrainedModel)


def _plain(module: nn.Module) -> nn.Module:
    """A module without PEFT's wrapper."""
    original: nn.Module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
    return original


def _last_width(module: nn.Module) -> int | None:
    """How many features the last of its linear layers gives."""
    linears: list[Any] = [part for part in _plain(module).modules() if is_linear(part)]
    return int(linears[-1].out_features) if linears else None


def _is_inside(name: str | None, outer: str) -> bool:
    return name is not None and f"{name}.".startswith(f"{outer}.")


def _from_the_end(model: nn.Module, name: str) -> str:
    """The path of a module, with `-1` for the number of the last one of a list."""
    holder, _, number = name.rpartition(".")
    is_last = number.isdigit() and int(number) == len(list(model.get_submodule(holder).children())) - 1
    return f"{holder}.-1" if is_last else name


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def match_projectors(model: nn.Module, wanted: list[str]) -> list[str]:
    """The paths that end with the given names, as `modules_to_save` matches them."""
    names = [name for name, _ in model.named_modules()]
    found: list[str] = []
    for suffix in wanted:
        matches = [name for name in names if _ends(name, suffix)]
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
    """
    prefix, head = "", None
    if isinstance(model, PreTrainedModel):
        head = model.get_output_embeddings()
    if takes_images(model):
        encoder, language_model = image_encoder_name(model), language_model_name(model)
        if language_model is None or _is_inside(encoder, language_model):
            raise ValueError(
                f"Cannot tell the language model of {type(model).__name__} from the rest: `get_decoder()` gives "
                f"{_quoted(language_model)}, and the vision tower `get_encoder(modality='image')` is "
                f"{_quoted(encoder)}. Please specify `target_modules` in the config."
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
        if is_linear(module):
            found.append(name)
    return found


def _name_of(model: nn.Module, part: nn.Module) -> str | None:
    return next((name for name, module in model.named_modules() if module is part), None)
