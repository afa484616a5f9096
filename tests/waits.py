"""Where the host would wait for a GPU, told on the CPU by following what is on the device and what the host knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.launches import Launches
from peft_many.families import image_rows
from peft_many.routing import row_weights


class PretendedGPU(Launches):
    """`Launches` in which a model and its inputs are on a device, and so is what is made of them, until `.cpu()`."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self._there: dict[int, Any] = {}  # storages, kept alive so that none gets another one's place
        for tensor in (*model.parameters(), *model.buffers(), *inputs.values()):
            self.put(tensor)

    def put(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._there[storage._cdata] = storage
        return tensor

    def holds(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._there

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not any(map(self.holds, tree_leaves((args, kwargs)))):
            return func(*args, **(kwargs or {}))  # the host's own
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.put(tensor)
        return result

    @contextmanager
    def __call__(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGPU]:
        def cpu(tensor: Tensor) -> Tensor:
            if not self.holds(tensor):
                return tensor
            self.waits["cpu"] += 1
            with torch.utils._python_dispatch._disable_current_modes():
                return tensor.detach().clone()

        def moved(tensor: Tensor, device: torch.device) -> Tensor:
            with torch.utils._python_dispatch._disable_current_modes():
                return self.put(tensor.clone())

        with monkeypatch.context() as patch, self:
            patch.setattr(Tensor, "cpu", cpu)
            for module in (image_rows, row_weights):
                patch.setattr(module, "moved", moved)
            yield self


def on_pretended_gpu(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, inputs: dict[str, Tensor], call: Callable[[], Any] | None = None
) -> PretendedGPU:
    """What the device does and where the host waits for it, in a call of the model with the inputs or another one."""
    gpu = PretendedGPU(model, inputs)
    with torch.no_grad(), gpu(monkeypatch):
        (call or (lambda: model(**inputs)))()
    return gpu
