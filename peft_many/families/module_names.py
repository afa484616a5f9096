"""What modules are called now that had other names in earlier versions of transformers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

Names = Callable[[str], str | None]

# What can be said without a model: before v5 the multimodal parts stood beside the language model's head.
_BEFORE_V5 = (
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^(multi_modal_projector|vision_tower)(?=\.|$)"), r"model.\1"),
)


def names_on(model: nn.Module) -> Names:
    """A function from the path that a module had when an adapter was trained to its path in this model, if any.

    Where the path is none of the model's, transformers' own renamings for loading checkpoints of earlier versions
    apply.
    """
    modules = {name for name, _ in model.named_modules()}
    known = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    renamings = [renaming for renaming in known if isinstance(renaming, WeightRenaming)]
    prefix = f"{model.base_model_prefix}." if isinstance(model, PreTrainedModel) else ""

    @functools.cache
    def current(path: str) -> str | None:
        if path in modules:
            return path
        key = f"{path}.weight"  # they are for tensors
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        renamed = key.removesuffix(".weight")
        candidates = (renamed, f"{prefix}{renamed}", renamed.removeprefix(prefix))
        return next((name for name in candidates if name in modules), None)

    return current


def names_before_v5(path: str) -> str:
    """As `names_on`, by what is known without the model."""
    for pattern, new in _BEFORE_V5:
        path = pattern.sub(new, path)
    return path
