"""Tensors on a GPU that is not there: what runs on them neither waits for values nor mixes devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from benchmarks.gpu.launches import Launches


@contextlib.contextmanager
def fake_gpu() -> Iterator[Launches]:
    """Count what runs in the `with` block, where tensors have shapes and devices but no values.

    Asking for a value is a `DataDependentOutputException`, and for a shape that depends on one a
    `DynamicOutputShapeException`.
    """
    with FakeTensorMode(), _Indexing(), Launches() as counted:
        yield counted


class _Indexing(TorchFunctionMode):
    """Index by operations: PyTorch's own indexing asks a real GPU for its device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__getitem__ or args[0].device.type == "cpu":
            return func(*args, **(kwargs or {}))
        found, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        dimension = 0
        for place, one in enumerate(index):
            if one is None:
                found = found.unsqueeze(dimension)
            elif one is Ellipsis:
                dimension = found.dim() - sum(rest is not None for rest in index[place + 1 :]) - 1
            elif isinstance(one, int):
                found, dimension = found.select(dimension, one), dimension - 1
            elif isinstance(one, slice):
                found = torch.ops.aten.slice(found, dimension, one.start, one.stop, one.step or 1)
            else:
                found, dimension = torch.ops.aten.index(found, [*[None] * dimension, one]), dimension + one.dim() - 1
            dimension += 1
        return found
