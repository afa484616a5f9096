"""Measuring merging methods one after another on the same adapters: each in fresh processes, whole or on parts."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Measurement, console, measure
from dense_methods import Groups, optimum, relative_distance
from synthesise import WEIGHTS_NAME, Sizes


@dataclass(frozen=True)
class Part:
    """Layers that are measured together, those that share their input grouped; their time counts `scale` times."""

    scale: float
    groups: Groups


def parts_of(sizes: Sizes, groups: Groups, samples: int) -> list[Part]:
    """`samples` groups of every distinct shape, each kind scaled up to all groups of its shape."""
    kinds: dict[Any, list[Sequence[str]]] = {}
    for group in groups:
        kinds.setdefault(tuple(sizes.shape(module) for module in group), []).append(group)
    return [Part(len(alike) / len(alike[:samples]), alike[:samples]) for alike in kinds.values()]


class Runner:
    """Measures methods, functions of `(adapter folders, output folder, *arguments)`, and collects what they cost.

    Args:
        scratch (`Path`): A folder for the outputs, which are removed at once, and for the optimum.
        folders (`dict[str, list[Path]]`): The adapters, by kind (`lora`, `many`).
        checked (`Sequence[Part]`): The layers whose distance from the optimum is computed.
        threads (`int`): The number of threads of every method.
        repeats (`int`): How often methods that are measured whole are run.
    """

    def __init__(
        self, scratch: Path, folders: dict[str, list[Path]], checked: Sequence[Part], threads: int, repeats: int
    ) -> None:
        self.scratch, self.folders, self.checked = scratch, folders, checked
        self.threads, self.repeats = threads, repeats
        self.results: dict[str, dict[str, Any]] = {}
        self.console = console()

    def whole(
        self, name: str, function: Callable[..., Any], *args: Any, kind: str = "lora", check: bool = False
    ) -> None:
        """Measure a method on all layers: the median time of the repetitions, and the highest memory."""
        with self._failure_noted(name):
            runs, distances, written = [], [], 0
            for repetition in range(self.repeats):
                with self._output() as output:
                    runs.append(self._run(kind, function, self.folders[kind], output, *args))
                    written = _bytes_below(output)
                    if check and repetition == 0:
                        distances = [self._distance(output, part) for part in self.checked]
            seconds = [run.seconds for run in runs]
            self._note(name, statistics.median(seconds), runs, written, distances, False, {"seconds_all": seconds})

    def on_parts(
        self,
        name: str,
        function: Callable[..., Any],
        parts: Sequence[Part],
        argument: Callable[[Part], Any],
        check: bool = False,
    ) -> None:
        """Measure a slow method on parts, each in a process of its own, and scale the times up to all layers."""
        with self._failure_noted(name):
            runs, distances, written, measured = [], [], 0, []
            for part in parts:
                with self._output() as output:
                    run = self._run("lora", function, self.folders["lora"], output, argument(part))
                    runs.append(run)
                    written = max(written, _bytes_below(output))
                    distances += [self._distance(output, part)] if check else []
                layers = [module for group in part.groups for module in group]
                measured.append({"layers": layers, "scale": part.scale, "seconds": run.seconds})
            seconds = sum(part.scale * run.seconds for part, run in zip(parts, runs))
            extrapolated = any(part.scale > 1 for part in parts)
            self._note(name, seconds, runs, written, distances, extrapolated, {"measured": measured})

    def _run(self, kind: str, function: Callable[..., Any], *args: Any) -> Measurement:
        """One run with the page cache as warm, and the disk as idle, as they are for every other."""
        os.sync()
        for file in (file for folder in self.folders[kind] for file in folder.iterdir()):
            with open(file, "rb", buffering=0) as content:
                while content.read(1 << 24):
                    pass
        return measure(function, *args, threads=self.threads)

    def _distance(self, output: Path, part: Part) -> float:
        lora = self.folders["lora"]
        optimal = self.scratch / f"optimum-{part.groups[0][0]}-{len(part.groups)}.safetensors"
        if not optimal.exists():
            measure(optimum, lora, optimal, part.groups, threads=self.threads)
        merged = next(output.rglob(WEIGHTS_NAME))
        return measure(relative_distance, lora, merged, optimal, threads=self.threads).result

    def _note(
        self,
        name: str,
        seconds: float,
        runs: Sequence[Measurement],
        written: int,
        distances: Sequence[float],
        extrapolated: bool,
        more: dict[str, Any],
    ) -> None:
        highest = max(runs, key=lambda run: run.peak_memory)
        self.results[name] = {
            "seconds": seconds,
            "peak_memory": highest.peak_memory,
            "peak_anonymous": highest.peak_anonymous,
            "memory_before": highest.memory_before,
            "output_bytes": written,
            "distance_to_optimum": max(distances) if distances else None,
            "extrapolated": extrapolated,
            **more,
        }
        self.console.print(f"{name}: {seconds:.3g} s{' (extrapolated)' if extrapolated else ''}", style="dim")

    @contextmanager
    def _output(self) -> Iterator[Path]:
        """A folder that does not exist yet, removed afterwards: a merge is as large as all that it was made of."""
        output = self.scratch / "merged"
        try:
            yield output
        finally:
            shutil.rmtree(output, ignore_errors=True)

    @contextmanager
    def _failure_noted(self, name: str) -> Iterator[None]:
        """One method that runs out of memory should not cost the results of the others."""
        try:
            yield
        except (BrokenProcessPool, MemoryError, RuntimeError) as error:
            self.results[name] = {"failed": f"{type(error).__name__}: {error}"}
            self.console.print(f"{name} failed: {error}", style="red")


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
