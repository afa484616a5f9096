"""What cannot be told by a model's structure: a row for each family that needs one, by its `model_type`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tiles:
    """How the tiles of an image, or the frames of a video, stand in the prompt, where nothing says how many they are.

    Args:
        gap (`int`): The most tokens that stand between two of one image.
        own_opener (`bool`): Whether the token in front of a tile is another one than in front of an image.
        number (`int`, *optional*):
            How many there are of every image that is cut, if markers do not tell images apart. As many images that are
            not cut, with no text in between, would be taken for one.
    """

    gap: int
    own_opener: bool = False
    number: int | None = None


@dataclass(frozen=True)
class Exceptional:
    """What is to be known of one family.

    Args:
        projectors (`tuple[str, ...]`):
            The projectors, by the end of their paths; empty if their place tells them. `-1` is the last of a list.
        language_model (`str`, *optional*): The language model, by its path, if `get_decoder()` gives more than that.
        pools_encoder (`bool`):
            Whether images are told apart by what the vision tower gives, as the projector reads something else.
        one_by_one (`bool`): Whether the projector is called for each image by itself.
        tiles ([`Tiles`], *optional*): Of families that cut images into tiles and do not say how many.
        frames ([`Tiles`], *optional*): Of families that hand over videos as frames and do not say how many.
    """

    projectors: tuple[str, ...] = ()
    language_model: str | None = None
    pools_encoder: bool = False
    one_by_one: bool = False
    tiles: Tiles | None = None
    frames: Tiles | None = None


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
    "git": Exceptional(projectors=("git.visual_projection",), language_model="git.encoder"),
    "idefics": Exceptional(projectors=("perceiver_resampler",), language_model="model.layers"),
    "phi4_multimodal": Exceptional(projectors=("img_projection_down",), language_model="model.layers"),
    # A Q-Former reads the tower, in InstructBLIP with the instruction at hand, and the projector reads its queries.
    "blip-2": Exceptional(pools_encoder=True),
    "instructblip": Exceptional(pools_encoder=True),
    "instructblipvideo": Exceptional(pools_encoder=True),
    "hunyuan_vl": Exceptional(one_by_one=True),
    # All tiles of an image are one run of placeholders,
    "aria": Exceptional(tiles=Tiles(0)),
    # (of Inkling each token is a tile, and the last layer of its tower is what projects)
    "inkling_mm_model": Exceptional(projectors=("vision_tower.encoder_layers.-1",), tiles=Tiles(0)),
    "internvl": Exceptional(tiles=Tiles(0)),
    "perception_lm": Exceptional(tiles=Tiles(0)),
    "qianfan_ocr": Exceptional(tiles=Tiles(0)),
    "got_ocr2": Exceptional(tiles=Tiles(0)),
    # or have a token in between,
    "aya_vision": Exceptional(tiles=Tiles(1)),
    "cohere2_vision": Exceptional(tiles=Tiles(1)),
    "ovis2": Exceptional(tiles=Tiles(1)),
    # which between two images is the same one: they are cut into four and the whole, or not at all;
    "idefics2": Exceptional(tiles=Tiles(1, number=5)),
    # or two, or line breaks more.
    "llama4": Exceptional(tiles=Tiles(2)),
    "granite_docling": Exceptional(tiles=Tiles(4)),
    "idefics3": Exceptional(tiles=Tiles(4)),
    "smolvlm": Exceptional(tiles=Tiles(4)),
    "minicpm_ocr": Exceptional(tiles=Tiles(3, own_opener=True), frames=Tiles(3)),
    "minicpmv4_6": Exceptional(tiles=Tiles(3, own_opener=True), frames=Tiles(3)),
    "minicpmv4_7": Exceptional(tiles=Tiles(3, own_opener=True), frames=Tiles(3)),
}


def exceptional(model: Any) -> Exceptional:
    """The family's row, or one that says nothing."""
    return EXCEPTIONS.get(getattr(getattr(model, "config", None), "model_type", ""), Exceptional())
