"""Where multimodal models keep their parts: the language model's linear layers and the projectors."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .family import Parts, ends_in, family_of
from .linears import is_linear
from .structure import is_inside, last_width, may_project, members_of, name_of, parts_by_structure, plain

# What the arguments of `forward` that take images are called in transformers: `pixel_values`, `flattened_patches`, ...
_WORDS_FOR_IMAGES = ("pixel", "image", "patch")


def _takes_images(model: PreTrainedModel) -> bool:
    """Whether transformers says that a model reads text and images, or videos."""
    if "vision_config" in model.config.sub_configs:  # in transformers 5.19 not every family claims what it reads
        return True
    claimed = model.input_modalities
    # The text-only models of a family (`Llama4ForCausalLM`) inherit the claim of the family as a whole.
    arguments = " ".join(inspect.signature(type(model).forward).parameters)
    reads_images = any(word in arguments for word in _WORDS_FOR_IMAGES)
    return "text" in claimed and ("image" in claimed or "video" in claimed) and reads_images


def text_encoder(model: nn.Module) -> nn.Module | None:
    """The text encoder of an encoder-decoder model, `None` for all other models."""
    if not isinstance(model, PreTrainedModel) or not getattr(model.config, "is_encoder_decoder", False):
        return None
    encoder: nn.Module = model.get_encoder()
    return None if encoder is model else encoder


def parts_of(model: nn.Module) -> Parts | None:
    """Where a model keeps its parts, for all who ask; `None` if it does not read images and text.

    Of its own models transformers says it. Others are known by their structure, and by rows that outsiders register.
    """
    told = _told_parts(model) if isinstance(model, PreTrainedModel) and _takes_images(model) else None
    is_whole = told is not None and told.language_model is not None and told.projectors
    if _is_of_transformers(model) or (is_whole and _is_of_transformers(model.config)):
        return told
    return _with_row(model, parts_by_structure(model) or told)


def reads_images(model: nn.Module) -> bool:
    """Whether it reads images and text; also of models inside of others, whose parts need not be found."""
    if isinstance(model, PreTrainedModel) and _takes_images(model):
        return True
    return not _is_of_transformers(model) and parts_by_structure(model) is not None


def find_projectors(model: nn.Module) -> list[str]:
    """The paths of the modules that turn vision features into tokens; several where a family has several.

    They are what lies between the vision tower and the language model. Where nothing does, they are those parts of the
    tower that end in the language model's width. A `ModuleList` of projectors (Qwen3-VL's deepstack mergers) counts as
    its members. Empty for models without images, and where they cannot be told.
    """
    parts = parts_of(model)
    return [] if parts is None else list(parts.projectors)


def _is_of_transformers(thing: object) -> bool:
    return type(thing).__module__.startswith("transformers.")


def _with_row(model: nn.Module, parts: Parts | None) -> Parts | None:
    """The parts as far as the family's row does not name others."""
    row = family_of(model)
    if row.language_model is not None:
        parts = replace(parts or Parts(), language_model=row.language_model)
    if not row.projectors:
        return parts
    paths = [(name, _from_the_end(model, name)) for name, _ in model.named_modules()]
    named = [name for name, other in paths if any(ends_in(name, end) or ends_in(other, end) for end in row.projectors)]
    return replace(parts or Parts(), projectors=tuple(named))


def _told_parts(model: PreTrainedModel) -> Parts | None:
    """The parts by transformers' methods and the family's row."""
    encoder, language_model = _image_encoder_name(model), _language_model_name(model)
    doubt = (
        "a module with weight matrices was looked for that lies between the vision tower "
        f"`get_encoder(modality='image')` ({_quoted(encoder)}) and the language model: `get_decoder()` gives "
        f"{_quoted(language_model)}; and then a part of the tower that ends in the language model's width."
    )
    towers = () if encoder is None else (encoder,)
    if language_model is None or is_inside(encoder, language_model):
        return _with_row(model, Parts(None, towers, (), doubt))
    projectors = _projectors_between(model, encoder, language_model)
    if encoder is not None and not projectors:
        projectors = _projectors_inside(model, encoder)
    return _with_row(model, Parts(language_model, towers, tuple(projectors), doubt))


def _image_encoder_name(model: PreTrainedModel) -> str | None:
    """The path of the vision tower, or `None` where there is none."""
    encoder: Any = model.get_encoder(modality="image")
    for_text: Any = text_encoder(model)
    if encoder is for_text:  # it reads images and text; the tower is a part of it
        encoder = for_text.get_encoder(modality="image")
    return None if encoder is model else name_of(model, encoder)


def _language_model_name(model: PreTrainedModel) -> str | None:
    """The path of the language model, `None` if it is not a part of its own."""
    if (registered := family_of(model).language_model) is not None:
        return registered
    decoder = model.get_decoder()
    return None if decoder is model else name_of(model, decoder)


def _quoted(path: str | None) -> str:
    return "no part of it" if path is None else f"'{path}'"


def _projectors_between(model: PreTrainedModel, encoder: str | None, language_model: str) -> list[str]:
    """The modules with weight matrices beside the vision tower and the language model, below what holds both."""
    embeddings = (model.get_output_embeddings(), model.get_input_embeddings())
    ends = [end for end in (encoder, language_model) if end is not None]
    return [
        path
        for holder in _holders(encoder, language_model)
        for path, child in members_of(model, holder)
        if not any(child is end for end in embeddings)
        and not any(is_inside(end, path) or is_inside(path, end) for end in ends)
        and may_project(child)
    ]


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
        name: type(plain(child))
        for name, child in tower.named_children()
        if not isinstance(child, nn.ModuleList) and may_project(child) and last_width(child) == width
    }
    members = [
        f"{name}.{i}"
        for name, child in tower.named_children()
        if isinstance(child, nn.ModuleList)
        for i, member in enumerate(child)
        if type(plain(member)) in found.values()
    ]
    return [f"{encoder}.{name}" for name in [*found, *members]]


def _from_the_end(model: nn.Module, name: str) -> str:
    """The path of a module, with `-1` for the number of the last one of a list."""
    holder, _, number = name.rpartition(".")
    is_last = number.isdigit() and int(number) == len(list(model.get_submodule(holder).children())) - 1
    return f"{holder}.-1" if is_last else name


def match_projectors(model: nn.Module, wanted: list[str]) -> list[str]:
    """The paths that end with the given names, as `modules_to_save` matches them."""
    names = [name for name, _ in model.named_modules()]
    found: list[str] = []
    for suffix in wanted:
        matches = [name for name in names if ends_in(name, suffix)]
        if not matches:
            raise ValueError(
                f"`projector_modules` names '{suffix}', but no module of {type(model).__name__} ends with that name."
            )
        found += [name for name in matches if name not in found]
    check_ends(model, found)
    wrapped = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    for outer in [*found, *wrapped]:
        inner = next((name for name in found if name.startswith(f"{outer}.")), None)
        if inner is not None:
            raise ValueError(f"`projector_modules` names '{inner}', which is a part of the projector '{outer}'.")
    return found


def check_ends(model: nn.Module, projectors: Sequence[str]) -> None:
    """Refuse projectors that PEFT cannot tell from other modules: it compares the ends of names, within words too."""
    names = [name for name, _ in model.named_modules()]
    for projector in projectors:
        other = next((name for name in names if name.endswith(projector) and name not in projectors), None)
        if other is not None:
            raise ValueError(
                f"The projector '{projector}' cannot be told from '{other}' by PEFT, which compares the ends of names "
                "and would train both. Give the projector's attribute another name, or pass `projector_modules=[]` to "
                "leave it as it is."
            )


def language_model_linears(model: nn.Module, parts: Parts | None = None) -> list[str]:
    """The paths of all linear layers of the language model, adapted or not, without the output head.

    Where images play no part, that is the whole model; where the language model cannot be told, all but the vision
    towers and the projectors. Modules trained whole (`modules_to_save`) are left out. Its `parts`, if they are known,
    need not be looked for.
    """
    parts = parts or parts_of(model) or Parts("")
    prefix = f"{parts.language_model}." if parts.language_model else ""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found: list[str] = []
    closed = [] if prefix else [f"{name}." for name in (*parts.towers, *parts.projectors)]
    for name, module in model.named_modules():
        if not name.startswith(prefix) or f"{name}.".startswith(tuple(closed)):
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
