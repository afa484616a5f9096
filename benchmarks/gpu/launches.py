"""How many kernels a call would launch on a GPU, and where the host would wait for one: counted, on any device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their result, or its shape, depends on values: the host waits for the device to know it.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
# They make tensors or describe them; the device has nothing to do.
_NO_KERNEL = (
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view"),
    "prim::device",  # of fake tensors
)


class Launches(TorchDispatchMode):
    """Counts what PyTorch's dispatcher sees while the `with` block runs, on a CPU as on a GPU.

    Views and allocations launch nothing; every other operation counts as one kernel, decompositions and sorts too,
    which launch several. Below autograd and autocast, so that their casts count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()  # by operation
        self.waits: Counter[str] = Counter()  # by operation: what makes the host wait for the device

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry out an operation and count it."""
        given = tree_leaves((args, kwargs))
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if self._waits(name, given, result):
            self.waits[name] += 1
        if name not in _NO_KERNEL and not _is_view(func, given, result):
            self.kernels[name] += 1
        return result

    def _waits(self, name: str, given: list[Any], result: Any) -> bool:
        if name in _WAITS:
            return True
        tensors = [one for one in given if isinstance(one, Tensor)]
        if name in ("index", "index_put", "index_put_"):  # with a mask, its places have to be known
            return any(one.dtype in (torch.bool, torch.uint8) for one in tensors[1:])
        if name in ("_to_copy", "copy_"):
            arrived = result if isinstance(result, Tensor) else tensors[0]
            source = tensors[-1] if name == "copy_" else tensors[0]
            return arrived.device.type == "cpu" and source.device.type != "cpu"
        return False


def _is_view(func: Any, given: list[Any], result: Any) -> bool:
    """Whether an operation only looks at its input in another way."""
    if func.is_view:
        return True
    mutates = any(
        argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
    )
    return not mutates and any(result is one for one in given if isinstance(one, Tensor))


def launches(call: Callable[[], Any]) -> Launches:
    """What a call launches and waits for."""
    with Launches() as counted:
        call()
    return counted
