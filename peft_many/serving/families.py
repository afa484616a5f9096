"""The families that are routed in vLLM, a row each: whose class, which projector, and how images lie in a batch.

A row holds for the versions of vLLM in `KNOWN_VERSIONS`, and is tested with the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KNOWN_VERSIONS = ("0.32",)


def is_known(version: str) -> bool:
    """Whether the rows hold for a version of vLLM."""
    return version.startswith(tuple(f"{known}." for known in KNOWN_VERSIONS))


# What each image has of the rows that a projector gets, `(images,)`, up to a factor: all get what they have in
# proportion. Of the arguments of `embed_multimodal`, those of a batch of images.
Shares = Callable[[Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class ServedFamily:
    """What has to be known of a family.

    Args:
        model (`str`): Its class in vLLM, as `"module:Class"` within `vllm.model_executor.models`.
        projector (`str`): That of its projectors, in the module that makes them.
        shares (`Callable`): How images lie in a batch.
    """

    model: str
    projector: str
    shares: Shares


def _alike(arguments: Mapping[str, Any]) -> Tensor:
    """All images have as many."""
    return torch.ones(len(arguments["pixel_values"]), dtype=torch.long)


def _lists_of_tiles(arguments: Mapping[str, Any]) -> Tensor:
    """Each image comes as a tensor of its tiles."""
    return torch.tensor([len(tiles) for tiles in arguments["pixel_values"]])


def _numbers_of_tiles(*names: str) -> Shares:
    """An argument says how many tiles each image has, or frames each video."""
    return lambda arguments: torch.as_tensor(next(arguments[name] for name in names if name in arguments)).flatten()


def _grids(arguments: Mapping[str, Any]) -> Tensor:
    """`(images, 3)`: time, height and width in patches."""
    found = next(arguments[name] for name in ("image_grid_thw", "video_grid_thw") if name in arguments)
    return torch.as_tensor(found).prod(-1)


def _areas(arguments: Mapping[str, Any]) -> Tensor:
    """Images of several sizes, none of them padded."""
    return torch.tensor([image.shape[-2] * image.shape[-1] for image in arguments["pixel_values"]])


_LLAVA = "LlavaMultiModalProjector"
# By architecture, as models' configs name it.
FAMILIES = {
    "Gemma3ForConditionalGeneration": ServedFamily(
        "gemma3_mm:Gemma3ForConditionalGeneration", "gemma3_mm:Gemma3MultiModalProjector", _alike
    ),
    "Idefics3ForConditionalGeneration": ServedFamily(
        "idefics3:Idefics3ForConditionalGeneration", "idefics3:Idefics3Connector", _numbers_of_tiles("num_patches")
    ),
    "InternVLForConditionalGeneration": ServedFamily(
        "interns1:InternS1ForConditionalGeneration",
        "interns1:InternS1MultiModalProjector",
        _numbers_of_tiles("image_num_patches", "video_num_patches"),
    ),
    "LlavaForConditionalGeneration": ServedFamily("llava:LlavaForConditionalGeneration", f"llava:{_LLAVA}", _alike),
    "LlavaNextForConditionalGeneration": ServedFamily(
        "llava_next:LlavaNextForConditionalGeneration", f"llava_next:{_LLAVA}", _lists_of_tiles
    ),
    "Mistral3ForConditionalGeneration": ServedFamily(
        "mistral3:Mistral3ForConditionalGeneration", "mistral3:Mistral3MultiModalProjector", _areas
    ),
    "PaliGemmaForConditionalGeneration": ServedFamily(
        "paligemma:PaliGemmaForConditionalGeneration", "paligemma:PaliGemmaMultiModalProjector", _alike
    ),
    "Qwen2VLForConditionalGeneration": ServedFamily(
        "qwen2_vl:Qwen2VLForConditionalGeneration", "qwen2_vl:Qwen2VisionPatchMerger", _grids
    ),
    "Qwen2_5_VLForConditionalGeneration": ServedFamily(
        "qwen2_5_vl:Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl:Qwen2_5_VisionPatchMerger", _grids
    ),
    "Qwen3VLForConditionalGeneration": ServedFamily(
        "qwen3_vl:Qwen3VLForConditionalGeneration", "qwen3_vl:Qwen3_VisionPatchMerger", _grids
    ),
    "SmolVLMForConditionalGeneration": ServedFamily(
        "smolvlm:SmolVLMForConditionalGeneration", "idefics3:Idefics3Connector", _numbers_of_tiles("num_patches")
    ),
}
