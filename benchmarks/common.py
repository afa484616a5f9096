"""What the benchmarks share: the machine, its GEMM peak, time and memory of a fresh process, JSON and plots."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import set_forkserver_preload
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import peft_many

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, OTHERS = "#d1495b", "#8d99ae"  # the colours of the plots
SAMPLING_SECONDS = 0.005
GEMM_REPEATS = 8


@dataclass(frozen=True)
class Measurement:
    """What one call in a fresh process cost.

    Args:
        seconds (`float`): Wall time of the call, imports not included.
        peak_memory (`int`): Most bytes resident at once, mapped files, Python and the imported libraries included.
        peak_anonymous (`int`, *optional*):
            Most anonymous bytes at once: those that the system cannot drop and read again. Linux only.
        memory_before (`int`, *optional*): Bytes resident before the call: Python and the libraries. Linux only.
        result: What the function returned.
    """

    seconds: float
    peak_memory: int
    peak_anonymous: int | None
    memory_before: int | None
    result: Any


def measure(function: Callable[..., Any], *args: Any, threads: int) -> Measurement:
    """Call `function(*args)` in a process of its own, so that its peak memory is its own.

    The process is forked from one that has done nothing but import the libraries, which takes seconds.
    """
    set_forkserver_preload(["peft_many"])
    with ProcessPoolExecutor(max_workers=1, mp_context=ForkServerContext()) as pool:
        return pool.submit(_measured, function, args, threads).result()


def _measured(function: Callable[..., Any], args: tuple[Any, ...], threads: int) -> Measurement:
    torch.set_num_threads(threads)
    before, anonymous, done = _status("VmRSS"), [_status("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLING_SECONDS):
            anonymous.append(max(anonymous.pop() or 0, _status("RssAnon") or 0))

    watcher = threading.Thread(target=watch, daemon=True)
    if before is not None:
        watcher.start()
    start = time.perf_counter()
    result = function(*args)
    seconds = time.perf_counter() - start
    done.set()
    if before is not None:
        watcher.join()
    # Not getrusage first: on Linux a new process inherits the peak of the one that started it.
    peak = _status("VmHWM") or _resource_peak()
    return Measurement(seconds, peak, anonymous[0], before, result)


def _status(key: str) -> int | None:
    """A number of bytes from Linux's account of this process."""
    try:
        with open("/proc/self/status") as file:
            line = next((line for line in file if line.startswith(f"{key}:")), None)
    except OSError:
        return None
    return int(line.split()[1]) * 1024 if line else None


def _resource_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gemm_peak(size: int, threads: int) -> dict[str, float]:
    """The most floating-point operations per second that a square matrix product reaches here, by dtype."""
    torch.set_num_threads(threads)
    peaks = {}
    for dtype in (torch.float64, torch.float32):
        a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        out, seconds = a @ b, []
        for _ in range(GEMM_REPEATS):
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            seconds.append(time.perf_counter() - start)
        peaks[str(dtype).removeprefix("torch.")] = 2 * size**3 / min(seconds)
    return peaks


def seconds_of(call: Callable[[], object]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def console() -> Console:
    """Where tables go; what is no terminal would count as 80 columns wide, too few for them."""
    return Console(width=None if sys.stdout.isatty() else 120)


def machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        "peft_many": peft_many.__version__,
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="where to write JSON and plot")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that it works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    return parser


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON that ends with a newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure and its axes, in the one style that all plots have."""
    # Imported here, so that the processes that are measured do not hold it.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#dddddd",
            "savefig.dpi": 160,
        }
    )
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained")
