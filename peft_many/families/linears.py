"""Linear layers, whatever library they are of."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear: also quantised, or a `Conv1D`."""
    return isinstance(layer, (nn.Linear, Conv1D)) or "Linear" in type(layer).__name__


def features_of_linear(layer: nn.Module, side: int) -> int | None:
    """Input (1) or output (0) features of a linear layer, quantised or a `Conv1D`, where it tells."""
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.in_features if side else layer.out_features)  # type: ignore[arg-type]
    if hasattr(layer, "nx") and hasattr(layer, "nf"):
        return int(layer.nx if side else layer.nf)  # type: ignore[arg-type]
    return None
