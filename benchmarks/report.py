"""The results of the merge benchmark as a table on the console and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import OTHERS, OURS, new_figure
from rich.console import Console
from rich.table import Table


def print_table(console: Console, content: dict[str, Any]) -> None:
    """All methods with their ratios to ours, then what share of the machine's peak ours reaches."""
    table = Table("method", title="From adapters on disk to the merged adapter on disk")
    for heading in ("time", "× ours", "peak memory", "× ours", "anonymous", "output", "off optimum"):
        table.add_column(heading, justify="right")
    for name, result in content["methods"].items():
        if "failed" in result:
            table.add_row(name, result["failed"])
            continue
        table.add_row(
            name,
            duration(result["seconds"]) + ("*" if result["extrapolated"] else ""),
            _ratio(result["seconds_to_ours"]),
            size(result["peak_memory"]),
            _ratio(result["peak_memory_to_ours"]),
            size(result["peak_anonymous"]),
            size(result["output_bytes"]),
            "" if result["distance_to_optimum"] is None else f"{result['distance_to_optimum']:.1e}",
            style="bold" if name.startswith("peft_many") else None,
        )
    console.print(table)
    if any(result.get("extrapolated") for result in content["methods"].values()):
        console.print(
            "* extrapolated from a few layers of each shape; memory and output are those of the largest part"
        )
    peak, ours = content["gemm_peak_flops"], content["ours_arithmetic"]
    peaks = ", ".join(f"{dtype} {flops / 1e9:.0f}" for dtype, flops in peak.items())
    total, share = sum(ours["flops"].values()) / 1e9, ours["share_of_gemm_peak"]
    console.print(f"GEMM peak, Gflop/s: {peaks}. peft_many: {total:.3g} Gflop, {share:.1%} of the peak's pace.")


def save_plot(path: Path, content: dict[str, Any]) -> None:
    """Horizontal bars of time and memory on log axes, the fastest on top."""
    results = {name: result for name, result in content["methods"].items() if "failed" not in result}
    names = sorted(results, key=lambda name: -results[name]["seconds"])
    figure, panels = new_figure(1, 2, 11, 1.6 + 0.38 * len(names))
    for axis, key, title, label in (
        (panels[0], "seconds", "time", duration),
        (panels[1], "peak_memory", "peak memory", size),
    ):
        values = [results[name][key] for name in names]
        bars = axis.barh(names, values, color=[OURS if name.startswith("peft_many") else OTHERS for name in names])
        for bar, name in zip(bars, names):
            if results[name]["extrapolated"]:
                bar.set(hatch="///", edgecolor="white")
        axis.bar_label(bars, [label(value) for value in values], padding=4)
        axis.set_xscale("log")
        # From a round number below the shortest bar, with room on the right for the labels.
        axis.set_xlim(min(values) / 3, max(values) * (max(values) / min(values)) ** 0.25 * 3)
        axis.set_title(title)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.xaxis.set_major_formatter(lambda value, _, label=label: label(value))
        axis.minorticks_off()
    panels[1].set_yticklabels([])
    sizes, machine = content["sizes"], content["machine"]
    figure.suptitle(
        f"Merging {sizes['tasks']} adapters of r = {sizes['r']} ({sizes['layers']} decoder layers, width "
        f"{sizes['width']}), threads: {machine['threads']}. Hatched: extrapolated from a few layers."
    )
    figure.savefig(path)


def duration(seconds: float) -> str:
    """Seconds in words of two or three digits."""
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def size(count: float | None) -> str:
    """Bytes in words of two or three digits."""
    if count is None:
        return ""
    unit = next((unit for unit in ("GB", "MB", "kB") if count >= {"GB": 1e9, "MB": 1e6, "kB": 1e3}[unit]), "B")
    return f"{count / {'GB': 1e9, 'MB': 1e6, 'kB': 1e3, 'B': 1}[unit]:.3g} {unit}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3g}"
