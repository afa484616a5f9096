"""`python -m benchmarks.gpu`: is a merge on a GPU what it is on a CPU, and what does it cost there?

Correctness first, on small models in every dtype; then costs, at LLaVA-1.5-7B's size with random weights, six
tasks. All that is found is written at once to gpu.json. A step that fails is noted there with its traceback, and the
others go on; the exit status is 1 then, and where a result was wrong. `--tiny` does the same in miniature, on a CPU
too: its times say nothing, and what needs CUDA is skipped and says so.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..common import console, machine
from . import checks, costs, paths, processes, training
from .goals import GOALS, table_of_goals, table_of_steps
from .lab import Lab, in_full_precision
from .meters import Meter
from .sizes import FULL, TINY, Sizes
from .steps import Run, Step

HUNG = 120  # seconds beyond the budget after which a step is taken to hang


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("many-gpu"), help="where gpu.json goes")
    parser.add_argument("--scratch", type=Path, help="where 15 GB of files go; default: the system's temporary folder")
    parser.add_argument("--budget", type=float, default=440, help="seconds; steps that may take longer are skipped")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="names of steps")
    parser.add_argument("--tiny", action="store_true", help="in miniature, on a CPU too")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: cuda if there is one")
    given = parser.parse_args(arguments)
    given.device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if given.device.type != "cuda" and not given.tiny:
        parser.error("there is no GPU that PyTorch can use; `--tiny` runs everything in miniature on a CPU")
    unknown = [name for name in given.only or () if name not in {step.name for step in all_steps(True)}]
    if unknown:
        parser.error(f"there are no steps {unknown}; there are {[step.name for step in all_steps(True)]}")
    return given


def all_steps(cuda: bool) -> list[Step]:
    """In their order."""
    of_processes = [*processes.STEPS, *(processes.ATTEMPTS if cuda else ())]
    return [*checks.STEPS, *paths.STEPS, *of_processes, *costs.STEPS, *training.STEPS, *costs.COMPARISONS, *paths.LAST]


def about(device: torch.device, sizes: Sizes, budget: float) -> dict[str, Any]:
    """What the numbers depend on."""
    found = machine(torch.get_num_threads())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    size = {**asdict(sizes), "dtype": str(sizes.dtype)}
    return {"benchmark": "gpu", "in_miniature": sizes.is_tiny, "machine": found, "sizes": size, "budget": budget}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do all steps; the exit status."""
    given = options(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    in_full_precision()
    faulthandler.dump_traceback_later(given.budget + HUNG, exit=True)
    device = given.device
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    elif given.tiny:
        torch.set_num_threads(1)  # several would wait for each other more than compute
    sizes, meter, show = (TINY if given.tiny else FULL), Meter(device), console()
    path = given.output / "gpu.json"
    run = Run(path, about(device, sizes, given.budget), given.budget, _tell, meter.free, sizes.is_tiny)
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        chosen = [step for step in all_steps(meter.is_cuda) if given.only is None or step.name in given.only]
        run.all(chosen, Lab(meter, sizes, Path(scratch)))
    faulthandler.cancel_dump_traceback_later()
    run.about["goals"] = [goal.judged(run.records, sizes.is_tiny) for goal in GOALS]
    run.save()
    show.print(table_of_steps(run.records))
    show.print(table_of_goals(run.about["goals"]))
    if sizes.is_tiny:
        show.print("In miniature: only what is counted says something of full size.")
    show.print(f"{path}, after {run.elapsed:.0f} s: {'all is well' if run.went_well else 'something went wrong'}")
    return 0 if run.went_well else 1


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
