"""Time, memory, kernels and waits of a call on a device."""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .launches import launches

# What CUDA's runtime and driver call launching a kernel or a graph, and waiting for the device.
_LAUNCH = ("cudaLaunchKernel", "cuLaunchKernel")
_GRAPH = ("cudaGraphLaunch", "cuGraphLaunch")
_WAITED = "called a synchronizing CUDA operation"
_WAIT = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Meter:
    """Measures calls on a device."""

    device: torch.device

    @property
    def is_cuda(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def seconds(self, call: Callable[[], Any], repeats: int = 1, warm: int = 0) -> float:
        """The shortest time of a call, until the device is done with it."""
        found = []
        for repetition in range(warm + repeats):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            if repetition >= warm:
                found.append(time.perf_counter() - start)
        return min(found)

    def peak(self, call: Callable[[], Any]) -> int:
        """The most bytes that the call adds to those in use on the device, at once; CUDA only."""
        self.free()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def counted(self, call: Callable[[], Any]) -> dict[str, int]:
        """Kernels and waits that PyTorch's dispatcher sees, on any device."""
        found = launches(call)
        return {"kernels": found.kernels.total(), "waits": found.waits.total()}

    def waited(self, call: Callable[[], Any]) -> dict[str, Any]:
        """How often PyTorch says that the host waited for the device, and the lines of Python where; CUDA only.

        A profiler would see that too, but takes half a minute for a few forward passes of a large model.
        """
        self.wait()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        found = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in told if _WAITED in str(one.message))
        return {"waits": found.total(), "where": dict(found.most_common(12))}

    def profiled(self, call: Callable[[], Any]) -> dict[str, int] | None:
        """Kernels, graphs and waits that CUDA's runtime sees; `None` where the profiler may not look."""
        self.wait()  # no wait of this method's own counts
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            call()
        rows = [(row.key, row.count) for row in found.key_averages()]

        def total(names: tuple[str, ...]) -> int:
            return sum(count for key, count in rows if key.startswith(names))

        seen = {"launches": total(_LAUNCH), "graphs": total(_GRAPH), "waits": total(_WAIT)}
        return seen if any(seen.values()) else None


@dataclass
class Noted:
    """Batches that note when the last of them has been worked on, on the device too."""

    batches: Iterable[Any]
    meter: Meter
    ended: float = field(default=0.0, init=False)

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches
        self.meter.wait()
        self.ended = time.perf_counter()
