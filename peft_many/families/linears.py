"""Linear layers, whatever library they are of."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear(layer: nn.Module) -> bool:
    """Whether this is a linear layer, be it quantised, or a `Conv1D`.

    Attention layers of a `LinearAttention` class are none. Nor are routers of experts that begin as a linear layer and
    return more than its product (Llama 4).
    """
    kind = type(layer)
    if isinstance(layer, nn.Linear) and kind.__module__.startswith("transformers.models."):
        return kind.forward is nn.Linear.forward
    return isinstance(layer, (nn.Linear, Conv1D)) or ("Linear" in kind.__name__ and hasattr(layer, "in_features"))


def features_of_linear(layer: nn.Module, side: int) -> int | None:
    """Input (1) or output (0) features of a linear layer, quantised, a `Conv1D` or adapted, where it tells."""
    if isinstance(layer, BaseTunerLayer):
        layer = layer.get_base_layer()
    for names in (("out_features", "in_features"), ("nf", "nx")):
        if all(hasattr(layer, name) for name in names):
            return int(getattr(layer, names[side]))
    return None
