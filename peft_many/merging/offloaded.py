"""Merges on base models whose weights Accelerate has moved to other devices or to disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn

from ..files.source import write_adapter
from ..files.statistics import AdapterStatistics
from ..tuner.config import MAnyConfig
from ..tuner.layers import hang_on_layers


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are not in memory."""
    return any(parameter.is_meta for parameter in model.parameters())


def check_dispatched(model: nn.Module) -> None:
    """Raise `ValueError` if weights are offloaded in a way that PEFT cannot add an adapter to."""
    if is_offloaded(model) and getattr(model, "hf_device_map", None) is None:
        raise ValueError(
            f"Weights of this {type(model).__name__} are not in memory, and it has no device map by which PEFT could "
            "place an adapter (as after `cpu_offload` and `disk_offload`). Merge on the model as it was loaded and "
            "offload the result, or load it with `device_map`."
        )


def load_on_offloaded(
    model: nn.Module, config: MAnyConfig, tensors: dict[str, Tensor], adapter_name: str
) -> PeftModel:
    """Put a merge on a dispatched base model by PEFT's own loading, which dispatches the model again."""
    statistics, config.statistics = config.statistics, None
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), config, tensors)
        merged = PeftModel.from_pretrained(model, folder, adapter_name)
    loaded = merged.peft_config[adapter_name]
    loaded.statistics, loaded.base_model_name_or_path = statistics, getattr(model, "name_or_path", None)
    if isinstance(statistics, AdapterStatistics):
        hang_on_layers(merged.get_base_model(), adapter_name, statistics)
    return merged.eval()
