"""Where things are computed, and how they get there and back: what depends on the kind of device, in one place each.

A GPU works on its own while Python prepares its next step, until a number is asked for. So numbers are asked for many
at a time ([`numbers_of`]), and tensors move through pinned memory, without a wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)  # Apple's GPUs


def float64_device(device: str | torch.device) -> torch.device:
    """The device for float64: the one given, or the CPU in place of one that does not know float64."""
    chosen = torch.device(device)
    return torch.device("cpu") if chosen.type in WITHOUT_FLOAT64 else chosen


def has_caches(device: torch.device) -> bool:
    """Whether work is worth cutting into pieces that fit a cache; a GPU wants few large pieces."""
    return device.type == "cpu"


def is_on(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is on a device; `"cuda"` without a number is any of them."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A GPU gets it when its turn comes: the caller does not wait."""
    if is_on(tensor, device):
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        # Pinning has no gradient. Small tensors are read at once where they are not pinned.
        return (tensor if tensor.requires_grad else tensor.pin_memory()).to(device, non_blocking=True)
    return tensor.to(device)


def fetched(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; one of a GPU may be read after the next [`numbers_of`] of it, which waits."""
    return tensor.to("cpu", non_blocking=tensor.device.type == "cuda")


def numbers_of(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The entries of each tensor, in float64 where that is known: one wait for each device, and what it did before."""
    places: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(place)
    found: list[list[float]] = [[] for _ in tensors]
    for device, there in places.items():
        dtype = torch.float64 if float64_device(device) == device else torch.float32
        whole = torch.cat([tensors[place].detach().reshape(-1).to(dtype) for place in there]).tolist()
        end = 0
        for place in there:
            start, end = end, end + tensors[place].numel()
            found[place] = whole[start:end]
    return found
