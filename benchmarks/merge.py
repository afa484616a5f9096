"""What a merge costs: wall time and peak memory, from task adapters on disk to the merged adapter on disk.

`peft_many`'s `merge_adapter_files` beside PEFT's `add_weighted_adapter` (svd, ties, linear, cat), the textbook
recursion in float32 and RegMean, on the same synthesised adapters and in the same run, each in a fresh process with
the same number of threads. The slow ones are measured on a few layers of each shape and scaled by the number of
layers; the results say where. Also: how far the merges that solve the same problem are from the float64 optimum, and
what share of the machine's GEMM peak the merge reaches.

Writes merge.json and merge.png.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from common import gemm_peak, machine, measure, parser, write_json
from dense_methods import recursion, regmean
from flops import count_flops, share_of_peak
from report import print_table, save_plot
from runner import Part, Runner, parts_of
from synthesise import Sizes, add_size_options, sizes_from, synthesise
from weighted_adapter import merge_with_peft

from peft_many import merge_adapter_files

OURS, OURS_WHOLE = "peft_many", "peft_many, with projectors"
PEFT_FAST, PEFT_SVD = ("PEFT linear", "PEFT cat", "PEFT ties"), "PEFT svd"
REGMEAN, TEXTBOOK = "RegMean", "textbook RLS"
NAMES = (OURS, OURS_WHOLE, *PEFT_FAST, PEFT_SVD, REGMEAN, TEXTBOOK)
NOTES = [
    f"All methods but '{OURS_WHOLE}' merge the LoRA weights alone and read the same files: PEFT refuses adapters that "
    "share modules_to_save. Ratios are to 'peft_many'.",
    "Input files are in the page cache if they fit; nobody waits for the output to reach the disk (no fsync). "
    "peft_many's output also holds the statistics of all tasks, so that it can be merged further (output_bytes).",
    "Imports are not timed. PEFT merges inside a model: it gets a skeleton whose weights cost no time and no memory.",
    "peak_memory is all that is resident, with Python and the libraries (memory_before) and mapped input files; "
    "peak_anonymous leaves out what the system could drop and read again.",
    "extrapolated: measured on a few layers of each shape, time scaled by the number of layers; memory and output are "
    "those of the largest measured part, as if the method went through the model part by part.",
    "The dense methods make full matrices from the low-rank statistics, which is faster than reading full ones, and "
    "share them and their inverses among layers with the same input.",
    "distance_to_optimum: ‖ΔW − ΔW*‖ / ‖ΔW*‖ to a dense float64 solve of peft_many's objective, worst checked layer. "
    "For peft_many and the textbook it is their error; RegMean scales off-diagonal entries: it has another optimum.",
]


def merge_with_peft_many(folders: Sequence[Path], output: Path) -> None:
    """What is being measured."""
    merge_adapter_files(folders, output, progress=False)


def methods(runner: Runner, sizes: Sizes, samples: int) -> dict[str, Callable[[], None]]:
    """By name, what measures each method."""
    layers = [module for group in sizes.groups() for module in group]
    shapes = {module: sizes.shape(module) for module in layers}
    by_input = parts_of(sizes, sizes.groups(), samples)
    by_layer = parts_of(sizes, [[module] for module in layers], samples)

    def groups(part: Part) -> Any:
        return part.groups

    def layer_shapes(part: Part) -> Any:
        return {module: shapes[module] for group in part.groups for module in group}

    measured: dict[str, Callable[[], None]] = {
        OURS: lambda: runner.whole(OURS, merge_with_peft_many, check=True),
        OURS_WHOLE: lambda: runner.whole(OURS_WHOLE, merge_with_peft_many, kind="many"),
    }
    for name in PEFT_FAST:
        measured[name] = partial(runner.whole, name, partial(merge_with_peft, name.split()[1]), shapes)
    svd = partial(merge_with_peft, "svd")
    measured[PEFT_SVD] = lambda: runner.on_parts(PEFT_SVD, svd, by_layer, layer_shapes)
    measured[REGMEAN] = lambda: runner.on_parts(REGMEAN, regmean, by_input, groups, check=True)
    measured[TEXTBOOK] = lambda: runner.on_parts(TEXTBOOK, recursion, by_input, groups, check=True)
    return measured


def arithmetic(runner: Runner, output: Path) -> tuple[dict[str, int], list[str]]:
    """The floating-point operations of one merge, counted in a run that is not timed."""
    try:
        args = (merge_with_peft_many, runner.folders["lora"], output)
        return measure(count_flops, *args, threads=runner.threads).result
    finally:
        shutil.rmtree(output, ignore_errors=True)


def main() -> None:
    """Synthesise adapters, measure all methods, print a table, write JSON and the plot."""
    options = parser(__doc__)
    options.add_argument("--scratch", type=Path, help="keep the adapters here for the next run; default: throw away")
    options.add_argument("--repeats", type=int, help="of what is measured whole; default 3, quick 1")
    options.add_argument("--samples", type=int, default=1, help="layers of each shape for the slow ones; default 1")
    options.add_argument(
        "--methods", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"only some of: {', '.join(NAMES)}"
    )
    add_size_options(options)
    given = options.parse_args()
    sizes, repeats = sizes_from(given), given.repeats or (1 if given.quick else 3)
    for folder in (given.output, given.scratch or given.output):
        folder.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(prefix="adapters-", dir=given.scratch or given.output) as scratch:
        folders = synthesise(given.scratch / "adapters" if given.scratch else Path(scratch, "adapters"), sizes)
        checked = parts_of(sizes, sizes.groups(), given.samples)
        runner = Runner(Path(scratch), folders, checked, given.threads, repeats)
        peak = gemm_peak(256 if given.quick else 4096, given.threads)
        for name, measure_it in methods(runner, sizes, given.samples).items():
            if name in (OURS, *given.methods):
                measure_it()
        if "failed" in runner.results[OURS]:
            raise SystemExit(f"{OURS} failed, so there is nothing to compare.")
        flops, uncounted = arithmetic(runner, Path(scratch, "counted"))

    ours = runner.results[OURS]
    for result in runner.results.values():
        for key in ("seconds", "peak_memory", "peak_anonymous"):
            if result.get(key):
                result[f"{key}_to_ours"] = result[key] / ours[key]
    content = {
        "benchmark": "merge",
        "machine": machine(given.threads),
        "sizes": asdict(sizes),
        "repeats": repeats,
        "samples": given.samples,
        "gemm_peak_flops": peak,
        "ours_arithmetic": {
            "flops": flops,
            "share_of_gemm_peak": share_of_peak(flops, ours["seconds"], peak),
            "not_counted": uncounted,
        },
        "methods": runner.results,
        "notes": NOTES,
    }
    write_json(given.output / "merge.json", content)
    save_plot(given.output / "merge.png", content)
    print_table(runner.console, content)


if __name__ == "__main__":
    main()
