"""What a server was asked to route by, and whether it can: an error says so before anything is loaded."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.config import VllmConfig

from ..records import ROUTED_PREFIX
from .families import FAMILIES, KNOWN_VERSIONS, is_known
from .merge import ServedMerge


def told_merge(config: VllmConfig) -> Any:
    """What `additional_config` names as the merge, if it does."""
    return config.additional_config.get("peft_many") if isinstance(config.additional_config, dict) else None


def merge_to_route_by(config: VllmConfig) -> ServedMerge | None:
    """The merge that the server was told, or that lies in the model's own folder if it is called a routed one.

    Raises:
        ValueError: It cannot be routed by: the model, vLLM's version, another of its options, or the merge.
    """
    told, model = told_merge(config), config.model_config
    if told is None and any(name.startswith(ROUTED_PREFIX) for name in model.architectures):
        told = model.model if model.revision is None else f"{model.model}@{model.revision}"
    if told is None:
        return None
    if not is_known(vllm.__version__):
        raise ValueError(
            f"peft_many knows how to route projectors in vLLM {', '.join(KNOWN_VERSIONS)}, and this is "
            f'{vllm.__version__}: install one of these, or serve without "peft_many" in `additional_config`.'
        )
    merge = ServedMerge.read(told)
    if merge.record.routing:
        _check_routes_images(config)
    return merge


def _check_routes_images(config: VllmConfig) -> None:
    """Refuse models and options with which images would not be routed."""
    model = config.model_config
    _check_architecture(model.architecture, model.architectures)
    compiled, images = config.compilation_config, model.multimodal_config
    for problem, is_there in {
        "`cudagraph_mm_encoder`, as a CUDA graph cannot choose": compiled.cudagraph_mm_encoder,
        "`compile_mm_encoder`, as a compiled graph cannot choose": compiled.compile_mm_encoder,
        '`mm_encoder_tp_mode="data"`, as one device must see all images': images.mm_encoder_tp_mode == "data",
        "`enable_tower_connector_lora`, as LoRA there takes all images at once": getattr(
            config.lora_config, "enable_tower_connector_lora", False
        ),
        "`ec_transfer_config`, as another server may encode by no merge": config.ec_transfer_config is not None,
    }.items():
        if is_there:
            raise ValueError(f"vLLM cannot route projectors with {problem}; leave it out.")


def _check_architecture(served_as: str, named: list[str]) -> None:
    """Refuse models that nobody here would route: of what vLLM serves a model as, and what its config names."""
    if served_as.removeprefix(ROUTED_PREFIX) in FAMILIES:
        return
    known = next((name for name in named if name.removeprefix(ROUTED_PREFIX) in FAMILIES), None)
    if known is not None:
        raise ValueError(
            f"peft_many routes projectors of '{known}' in vLLM's own class for it, but vLLM was told to serve it as "
            f"'{served_as}': leave out `--model-impl`."
        )
    raise ValueError(
        f"peft_many knows no projectors of '{served_as}' in vLLM, so that its images would all go through the base "
        f"model's. It knows those of {', '.join(FAMILIES)}. Merge with `projectors='mean'` and serve what "
        '`peft-many export --format model` writes, or serve without "peft_many" in `additional_config`.'
    )
