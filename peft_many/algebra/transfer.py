"""From the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """What the host knows, on a device, without waiting until that has done what it was given before."""
    # CUDA has read what is not pinned when the call returns. Other devices promise nothing.
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and device.type == "cuda")
