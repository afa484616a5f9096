"""Where things are computed, and how they get there and back: what depends on the kind of device, in one place each.

A GPU works on its own while Python prepares its next step, until a number is asked for. So numbers are asked for many
at a time ([`numbers_of`]), and tensors move through pinned memory, without a wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

WITHOUT_FLOAT64 = ("mps",)  # Apple's GPUs


def float64_device(device: str | torch.device) -> torch.device:
    """The device for float64: the one given, or the CPU in place of one that does not know float64."""
    chosen = torch.device(device)
    return torch.device("cpu") if chosen.type in WITHOUT_FLOAT64 else chosen


def answers(device: str | int | torch.device, dtype: torch.dtype) -> torch.device:
    """The device, tried out and with its number, if it has one; a `ValueError` if it is not here or lacks the dtype.

    A GPU without a number is another one in each thread.
    """
    try:
        found = torch.zeros(1, dtype=dtype, device=device)
        found.item()
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"`device` {str(device)!r} cannot be used here: {first}") from None
    return found.device


def device_of(model: nn.Module) -> torch.device:
    """Where a model is, by its first parameter that is not offloaded."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def has_caches(device: torch.device) -> bool:
    """Whether work is worth cutting into pieces that fit a cache; a GPU wants few large pieces."""
    return device.type == "cpu"


def has_half_precision(device: torch.device) -> bool:
    """Whether products in bfloat16 and float16 are as fast as in float32; CPUs may have no instructions for them."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def multiply_rows_at_once(layer: nn.Module | None) -> None:
    """Make what a linear layer, such as a model's output embeddings if it has any, is given contiguous from now on.

    A CPU multiplies rows that are not, as the last tokens of a batch's prompts, by a copy of the weights each, in
    bfloat16 at least. Copies of a small model's vocabulary take longer than reading the prompts, and gigabytes.
    """
    if layer is not None:
        layer.register_forward_pre_hook(_contiguous)


def _contiguous(layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in given)


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


class Asked:
    """Numbers that devices were asked for: they arrive in their turn, and the caller goes on meanwhile.

    Args:
        tensors (`Sequence[Tensor]`): Whose entries are asked for, as they are now.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._lengths = [tensor.numel() for tensor in tensors]
        places: dict[torch.device, list[int]] = {}
        for place, tensor in enumerate(tensors):
            places.setdefault(tensor.device, []).append(place)
        self._coming: list[tuple[list[int], Tensor, torch.cuda.Event | None]] = []
        for device, there in places.items():
            dtype = torch.float64 if float64_device(device) == device else torch.float32
            whole = fetched(torch.cat([tensors[place].detach().reshape(-1).to(dtype) for place in there]))
            event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            self._coming.append((there, whole, event))

    @property
    def arrived(self) -> bool:
        """Whether reading would not wait."""
        return all(event is None or event.query() for _, _, event in self._coming)

    def read(self) -> list[list[float]]:
        """The entries of each tensor: one wait for each device, and for what it was told before."""
        found: list[list[float]] = [[] for _ in self._lengths]
        for there, whole, event in self._coming:
            if event is not None:
                event.synchronize()
            numbers, end = whole.tolist(), 0
            for place in there:
                start, end = end, end + self._lengths[place]
                found[place] = numbers[start:end]
        return found


def numbers_of(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The entries of each tensor, in float64 where that is known: one wait for each device, and what it did before."""
    return Asked(tensors).read()
