"""What cannot be told by a model's structure: a row for each family that needs one, by its `model_type`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exceptional:
    """What is to be known of one family.

    Args:
        projectors (`tuple[str, ...]`): The projectors, by the end of their paths; empty if their place tells them.
    """

    projectors: tuple[str, ...] = ()


EXCEPTIONS: dict[str, Exceptional] = {
    # Beside the projector of the vision tower they have one for audio, or one for images that they make.
    "gemma3n": Exceptional(projectors=("embed_vision",)),
    "gemma4": Exceptional(projectors=("embed_vision",)),
    "gemma4_unified": Exceptional(projectors=("embed_vision",)),
    "janus": Exceptional(projectors=("model.aligner",)),
    # Of two projectors in a row the second one is routed, which is next to the language model.
    "muse_glimmer": Exceptional(projectors=("vision_projection",)),
    "muse_spark": Exceptional(projectors=("vision_projection",)),
    # Its projector is a `PreTrainedModel`, as vision towers are.
    "molmo2": Exceptional(projectors=("multi_modal_projector",)),
}


def exceptional(model: Any) -> Exceptional:
    """The family's row, or one that says nothing."""
    return EXCEPTIONS.get(getattr(getattr(model, "config", None), "model_type", ""), Exceptional())
