"""How the cost of the merge's algebra grows: one `LeastSquaresMerge` of one input that three layers share.

The number of tasks, the width, the adapters' rank and the statistics' rank are varied alone around a base point. Each
point is the median time of adding all tasks and solving, in memory. An exponent is fitted to the upper half of each
series: time ~ value^exponent. Writes growth.json and growth.png.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import OURS, console, gemm_peak, machine, new_figure, parser, write_json
from flops import count_flops, share_of_peak
from rich.table import Table
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm

from peft_many.algebra.covariance import LowRankCovariance
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta

LAYERS = ("q", "k", "v")


@dataclass(frozen=True)
class Point:
    """The sizes of one merge. The layers are square, `width x width`."""

    tasks: int
    width: int
    adapter_rank: int
    statistics_rank: int


# The stacked statistics, tasks x rank, stay below the width everywhere: beyond it the merge takes another path.
BASE = Point(tasks=6, width=4096, adapter_rank=16, statistics_rank=48)
SERIES: Mapping[str, Sequence[int]] = {
    "tasks": (2, 4, 8, 16, 32, 64),
    "width": (1024, 2048, 4096, 8192, 16384),
    "adapter_rank": (8, 16, 32, 64, 128, 256),
    "statistics_rank": (16, 32, 64, 128, 256),
}
QUICK_BASE = Point(tasks=3, width=128, adapter_rank=4, statistics_rank=8)
QUICK_SERIES: Mapping[str, Sequence[int]] = {
    "tasks": (2, 4, 8),
    "width": (64, 128, 256),
    "adapter_rank": (2, 4, 8),
    "statistics_rank": (4, 8, 16),
}

Tasks = Sequence[tuple[LowRankCovariance, Mapping[str, LowRankDelta]]]


def make_tasks(point: Point) -> Tasks:
    """Random tasks of the given sizes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tasks = []
    for _ in range(point.tasks):
        deltas = {
            layer: LowRankDelta(A=random(point.adapter_rank, point.width), B=random(point.width, point.adapter_rank))
            for layer in LAYERS
        }
        factor = random(point.statistics_rank, point.width)
        tasks.append((LowRankCovariance(remainder=0.01, factor=factor), deltas))
    return tasks


def merge(tasks: Tasks) -> None:
    """What is timed."""
    problem = LeastSquaresMerge()
    for covariance, deltas in tasks:
        problem.add(covariance, deltas)
    problem.solve()


def measure_point(point: Point, threads: int, seconds: float, peak: Mapping[str, float]) -> dict[str, Any]:
    """The median time at one point, over at least `seconds`, and its share of the machine's GEMM peak."""
    tasks = make_tasks(point)
    timer = Timer("merge(tasks)", globals={"merge": merge, "tasks": tasks}, num_threads=threads)
    median = timer.blocked_autorange(min_run_time=seconds).median
    flops, _ = count_flops(merge, tasks)
    share = share_of_peak(flops, median, peak)
    return {**asdict(point), "seconds": median, "flops": sum(flops.values()), "share_of_gemm_peak": share}


def exponent(values: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of the upper half on log axes."""
    half = len(values) // 2
    return float(np.polyfit(np.log(values[half:]), np.log(seconds[half:]), 1)[0])


def print_table(content: Mapping[str, Any]) -> None:
    """One line for each point."""
    table = Table("varied", title="One merge of one shared input")
    for heading in ("value", "time, ms", "share of GEMM peak", "exponent"):
        table.add_column(heading, justify="right")
    for name, series in content["series"].items():
        for i, point in enumerate(series["points"]):
            last = i == len(series["points"]) - 1
            table.add_row(
                "" if i else name,
                str(point[name]),
                f"{1000 * point['seconds']:.3g}",
                f"{point['share_of_gemm_peak']:.0%}",
                f"{series['exponent']:.2f}" if last else "",
                end_section=last,
            )
    console().print(table)


def save_plot(path: Path, content: Mapping[str, Any]) -> None:
    """Four panels on log axes with the fitted slopes through their upper halves."""
    figure, axes = new_figure(1, 4, 12, 3.4)
    times = [point["seconds"] for series in content["series"].values() for point in series["points"]]
    for axis, (name, series) in zip(axes, content["series"].items()):
        values, seconds = series["values"], [point["seconds"] for point in series["points"]]
        fitted = values[len(values) // 2 :]
        middle = math.exp(np.log(fitted).mean())
        height = math.exp(np.log(seconds[len(values) // 2 :]).mean())
        line = [height * (value / middle) ** series["exponent"] for value in fitted]
        axis.loglog(values, seconds, "o", color=OURS)
        axis.loglog(fitted, line, color="#444444", linewidth=1.2, label=f"slope {series['exponent']:.2f}")
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.set_ylim(min(times) / 1.5, max(times) * 1.5)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms")
        axis.set_title(name.replace("_", " "))
        axis.legend(frameon=False, loc="upper left")
    base = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in content["base"].items())
    figure.suptitle(f"Time of one merge; otherwise {base}; threads: {content['machine']['threads']}")
    figure.savefig(path)


def main() -> None:
    """Measure all series, print a table, write JSON and the plot."""
    given = parser(__doc__).parse_args()
    base, lists = (QUICK_BASE, QUICK_SERIES) if given.quick else (BASE, SERIES)
    peak = gemm_peak(256 if given.quick else 4096, given.threads)
    series: dict[str, dict[str, Any]] = {}
    with tqdm(total=sum(map(len, lists.values())), desc="Measuring", unit="point") as bar:
        for field in fields(Point):
            points = []
            for value in lists[field.name]:
                point = replace(base, **{field.name: value})
                points.append(measure_point(point, given.threads, 0.05 if given.quick else 1.0, peak))
                bar.update()
            values = list(lists[field.name])
            fitted = exponent(values, [point["seconds"] for point in points])
            series[field.name] = {"values": values, "exponent": fitted, "points": points}
    content = {
        "benchmark": "growth",
        "machine": machine(given.threads),
        "gemm_peak_flops": peak,
        "base": asdict(base),
        "layers_per_input": len(LAYERS),
        "series": series,
    }
    write_json(given.output / "growth.json", content)
    save_plot(given.output / "growth.png", content)
    print_table(content)


if __name__ == "__main__":
    main()
