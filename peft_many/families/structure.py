"""The parts of models that transformers knows nothing of, such as remote code: found by what they are made of.

Where that leaves a doubt, the part is left out and the doubt is said in words: a guess could train the wrong thing
without anybody noticing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .family import Parts
from .linears import is_linear

_COLOURS = 3  # what goes into the first convolution of a vision tower; spectrograms have one channel


def parts_by_structure(model: nn.Module) -> Parts | None:
    """Where a model keeps its parts; `None` if it reads no images, or no text.

    A vision tower begins with a convolution over colours, or is a model of transformers that reads pixels. The
    language model is what holds the token embeddings and a list of layers. Beside or inside the tower, what leads from
    a width of the tower to that of the token embeddings is the projector, if it is the only one.
    """
    embeddings = _token_embeddings(model)
    arguments = set(inspect.signature(type(model).forward).parameters)
    if embeddings is None and not arguments & {"input_ids", "inputs_embeds"}:
        return None
    signs = [name for name in _signs_of_vision(model) if embeddings is None or not is_inside(embeddings, name)]
    if not signs:
        takes = sorted(name for name in arguments if name.startswith(("image", "pixel")))
        empty = "no vision tower was found in it: if that is loaded later or kept elsewhere, load it first"
        return Parts(doubt=f"its `forward` takes `{'`, `'.join(takes)}`, but {empty}.") if takes else None
    if embeddings is None:
        return Parts(towers=tuple(signs), doubt=f"'{signs[0]}' reads images, but no token embeddings were found.")
    towers = tuple(dict.fromkeys(_tower_of(sign, embeddings) for sign in signs))
    language_model = _language_model(model, embeddings, towers)
    width = int(plain(model.get_submodule(embeddings)).embedding_dim)
    projectors = (
        _beside(model, width, towers, [*towers, embeddings, language_model]) if language_model is not None else []
    )
    if not projectors and language_model is not None:
        projectors = [name for tower in towers for name in _inside(model, width, tower, signs)]
    doubt = (
        f"the vision tower is {_listed(towers)}, the token embeddings, of width {width}, are '{embeddings}', the "
        f"language model's layers are {_listed((language_model,) if language_model else ())}, and the parts beside "
        f"or inside the tower that end in that width are {_listed(projectors)}; the projector would be the only one, "
        "and read a multiple of a width of the tower."
    )
    is_clear = len(projectors) == 1 and _reads(model, projectors[0], towers)
    return Parts(language_model, towers, tuple(projectors) if is_clear else (), doubt)


def _listed(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "not to be told from the rest"


def _signs_of_vision(model: nn.Module) -> Iterator[str]:
    """The paths of what only vision towers have."""
    for name, module in model.named_modules():
        reads_pixels = isinstance(module, PreTrainedModel) and module.main_input_name.startswith("pixel")
        sees_colours = isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.in_channels == _COLOURS
        if name and (reads_pixels or sees_colours):
            yield name


def _token_embeddings(model: nn.Module) -> str | None:
    """The path of the token embeddings; those of the only language model in it, if the model does not say."""
    readers = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    found = {id(reader): embedding for reader in readers if (embedding := _embeddings_of(reader)) is not None}
    if id(model) in found:
        return name_of(model, found[id(model)])
    different = {id(embedding): embedding for embedding in found.values()}
    return name_of(model, *different.values()) if len(different) == 1 else None


def _embeddings_of(model: PreTrainedModel) -> nn.Module | None:
    embeddings = embeddings_of(model)
    return embeddings if isinstance(plain(embeddings), nn.Embedding) else None


def _tower_of(sign: str, embeddings: str) -> str:
    """The largest module around a sign of vision that does not hold the token embeddings."""
    path = sign.split(".")
    return next(
        tower for length in range(1, len(path) + 1) if not is_inside(embeddings, tower := ".".join(path[:length]))
    )


def _language_model(model: nn.Module, embeddings: str, towers: tuple[str, ...]) -> str | None:
    """The smallest module that holds the token embeddings and layers; where the tower is in there too, the layers."""
    holder = embeddings
    while not any(is_inside(tower, holder) for tower in towers):
        if _has_layers(model.get_submodule(holder)):
            return holder
        holder = holder.rpartition(".")[0]
    found = [
        path
        for path, child in children_of(model, holder)
        if not any(is_inside(tower, path) for tower in towers) and _has_layers(child)
    ]
    return found[0] if len(found) == 1 else None


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(part, nn.ModuleList) and may_project(part) for part in module.modules())


def _beside(model: nn.Module, width: int, towers: tuple[str, ...], ends: list[str]) -> list[str]:
    """The projectors among the modules beside the towers."""
    holders = dict.fromkeys(tower.rpartition(".")[0] for tower in towers)
    return [
        path
        for holder in holders
        for path, child in members_of(model, holder)
        if not any(is_inside(end, path) or is_inside(path, end) for end in ends) and _ends_in(child, width)
    ]


def _inside(model: nn.Module, width: int, tower: str, signs: list[str]) -> list[str]:
    """The projectors inside of a tower: the outermost ones. None if the tower itself is as wide."""
    if any(getattr(model.get_submodule(sign), "out_channels", None) == width for sign in signs):
        return []
    level = [tower]
    while level:
        children = [child for holder in level for child in children_of(model, holder)]
        level = [path for path, _ in children if any(is_inside(sign, path) for sign in signs)]
        found = [path for path, child in children if path not in level and _ends_in(child, width)]
        if found:
            return [path for path in found if not _is_stack(model.get_submodule(path))]
    return []


def _reads(model: nn.Module, projector: str, towers: tuple[str, ...]) -> bool:
    """Whether a projector begins with a multiple of a width of the towers, and not, say, with that of sounds."""
    first: Any = next(part for part in plain(model.get_submodule(projector)).modules() if is_linear(part))
    widths = {len(p) for tower in towers for p in model.get_submodule(tower).parameters() if p.dim() == 1}
    return any(width > 1 and first.in_features % width == 0 for width in widths)


def _is_stack(module: nn.Module) -> bool:
    """Whether it holds blocks in a row, as the layers of a tower are."""
    rows = (part for part in module.modules() if isinstance(part, (nn.ModuleList, nn.Sequential)))
    return any(next(block.children(), None) is not None for row in rows for block in row)


def _ends_in(module: nn.Module, width: int) -> bool:
    return may_project(module) and last_width(module) == width


def children_of(model: nn.Module, holder: str) -> list[tuple[str, nn.Module]]:
    """The modules directly inside of another one, with their paths in the model."""
    children = model.get_submodule(holder).named_children()
    return [(f"{holder}.{name}".removeprefix("."), child) for name, child in children]


def members_of(model: nn.Module, holder: str) -> list[tuple[str, nn.Module]]:
    """As `children_of`, with the members of lists in place of the lists."""
    found: list[tuple[str, nn.Module]] = []
    for path, child in children_of(model, holder):
        found += children_of(model, path) if isinstance(child, nn.ModuleList) else [(path, child)]
    return found


def may_project(module: nn.Module) -> bool:
    """Whether it holds a weight matrix, and is no model of its own, such as another tower or a Q-Former."""
    matrices = any(parameter.dim() == 2 for parameter in module.parameters())
    return matrices and not isinstance(plain(module), PreTrainedModel)


def plain(module: Any) -> Any:
    """A module without PEFT's wrapper, whether it is adapted or trained whole."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def embeddings_of(model: Any) -> nn.Module | None:
    """The token embeddings that a model names, if it reads text and is of transformers' kind."""
    try:
        embeddings: nn.Module | None = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embeddings


def last_width(module: nn.Module) -> int | None:
    """How many features the last of its linear layers gives."""
    linears: list[Any] = [part for part in plain(module).modules() if is_linear(part)]
    return int(linears[-1].out_features) if linears else None


def modules_around(path: str) -> list[str]:
    """The paths of the modules around another one, the nearest first."""
    return [path.rsplit(".", levels)[0] for levels in range(1, path.count(".") + 1)]


def is_inside(name: str | None, outer: str) -> bool:
    """Whether a path is that of a module, or of a part of it."""
    return name is not None and (not outer or f"{name}.".startswith(f"{outer}."))


def name_of(model: nn.Module, part: nn.Module) -> str | None:
    """The path of a module."""
    return next((name for name, module in model.named_modules() if module is part), None)
