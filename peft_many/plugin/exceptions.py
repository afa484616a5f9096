"""What cannot be told by a model's structure: a row for each family that needs one, by its `model_type`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exceptional:
    """What is to be known of one family.

    Args:
        projectors (`tuple[str, ...]`): The projectors, by the end of their paths; empty if their place tells them.
        language_model (`str`, *optional*): The language model, by its path, if `get_decoder()` gives more than that.
        pools_encoder (`bool`):
            Whether images are told apart by what the vision tower gives, as the projector reads something else.
        one_by_one (`bool`): Whether the projector is called for each image by itself.
        tile_gap (`int`, *optional*):
            Of families that cut images into tiles and do not say how many: the most tokens that stand between the
            tiles of one image in the prompt.
    """

    projectors: tuple[str, ...] = ()
    language_model: str | None = None
    pools_encoder: bool = False
    one_by_one: bool = False
    tile_gap: int | None = None


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
    # The language model holds the vision tower too.
    "git": Exceptional(projectors=("visual_projection",), language_model="git.encoder"),
    "phi4_multimodal": Exceptional(projectors=("img_projection_down",), language_model="model.layers"),
    # A Q-Former reads the tower, in InstructBLIP with the instruction at hand, and the projector reads its queries.
    "blip-2": Exceptional(pools_encoder=True),
    "instructblip": Exceptional(pools_encoder=True),
    "instructblipvideo": Exceptional(pools_encoder=True),
    "hunyuan_vl": Exceptional(one_by_one=True),
    # All tiles of an image are one run of placeholders,
    "internvl": Exceptional(tile_gap=0),
    "qianfan_ocr": Exceptional(tile_gap=0),
    "got_ocr2": Exceptional(tile_gap=0),
    # or have a token in between,
    "aya_vision": Exceptional(tile_gap=1),
    "cohere2_vision": Exceptional(tile_gap=1),
    "idefics2": Exceptional(tile_gap=1),
    # or two, or line breaks more.
    "llama4": Exceptional(tile_gap=2),
    "granite_docling": Exceptional(tile_gap=4),
    "idefics3": Exceptional(tile_gap=4),
    "smolvlm": Exceptional(tile_gap=4),
}


def exceptional(model: Any) -> Exceptional:
    """The family's row, or one that says nothing."""
    return EXCEPTIONS.get(getattr(getattr(model, "config", None), "model_type", ""), Exceptional())
