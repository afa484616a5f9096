"""Where a model keeps its parts, and what its structure does not tell; `register_family` is the door for that."""

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
class Family:
    """What has to be said of a model family because its structure does not tell. Most families need none of it.

    Args:
        projectors (`tuple[str, ...]`):
            The projectors, by the end of their paths; empty if they lie between the vision tower and the language
            model. `-1` is the last of a list.
        language_model (`str`, *optional*): The path of the language model, if `get_decoder()` gives more than that.
        routes_by_tower (`bool`):
            Whether images are compared by what the vision tower gives, because the projector reads something else.
        one_image_per_call (`bool`): Whether the projector is called for each image by itself.
        tiles ([`Tiles`], *optional*): Of families that cut images into tiles and do not say how many.
        frames ([`Tiles`], *optional*): Of families that hand over videos as frames and do not say how many.
    """

    projectors: tuple[str, ...] = ()
    language_model: str | None = None
    routes_by_tower: bool = False
    one_image_per_call: bool = False
    tiles: Tiles | None = None
    frames: Tiles | None = None


@dataclass(frozen=True)
class Parts:
    """Where a model that reads images and text keeps its parts, by their paths.

    Args:
        language_model (`str`, *optional*): What gets a LoRA by default; `None` if it cannot be told from the rest.
        towers (`tuple[str, ...]`): The vision towers.
        projectors (`tuple[str, ...]`): What turns vision features into tokens; empty if it cannot be told.
        doubt (`str`): What was looked for and seen, in words, for where a part is missing.
    """

    language_model: str | None = None
    towers: tuple[str, ...] = ()
    projectors: tuple[str, ...] = ()
    doubt: str = ""


FAMILIES: dict[str, Family] = {}


def register_family(model_type: str, family: Family) -> None:
    """Say of a model family what its structure does not tell.

    Call it before the model is wrapped or an adapter is loaded; in another process, again. What was registered for the
    same `model_type` before, be it by peft_many, is replaced.

    Args:
        model_type (`str`): The `model_type` of the family's config.
        family ([`Family`]): What is to be known.

    Example:

        ```py
        >>> from peft_many.families import Family, register_family

        >>> family = Family(projectors=("eye_to_mouth",), language_model="mouth")
        >>> register_family("my_vlm", family)
        ```
    """
    FAMILIES[model_type] = family


def is_registered_projector(path: str) -> bool:
    """Whether a family names its projector so, where there is no model to look at and tell which is a list's last."""
    return any(ends_in(path, end) for family in FAMILIES.values() for end in family.projectors)


def ends_in(path: str, end: str) -> bool:
    """Whether a module's path ends so, in whole names."""
    return path == end or path.endswith(f".{end}")


def family_of(model: Any) -> Family:
    """What is registered for a model's family, or a `Family` that says nothing."""
    return FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""), Family())
