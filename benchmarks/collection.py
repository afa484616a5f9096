"""What measuring costs: `collect_statistics` beside the same forward passes alone, at the widths of a 7B model.

One decoder layer of Llama-7B's shape with LoRA on all its linear layers, on samples of 704 tokens (576 of an image,
and a question). The cost of a sample is the median over those after the sketch has begun; finishing the statistics is
a fixed cost for each layer, given apart. Beside the default sketch of rank 256: rank 128, and whole covariances in
float64.

Writes collection.json and collection.png.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from common import OTHERS, OURS, console, machine, new_figure, parser, write_json
from peft import get_peft_model
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from peft_many import MAnyConfig, collect_statistics


@dataclass(frozen=True)
class Sizes:
    """The model's widths, the tokens of a sample, the samples of a pass, and with which of them the sketch runs."""

    width: int = 4096
    intermediate: int = 11008
    heads: int = 32
    tokens: int = 704
    samples: int = 12
    begins: int = 3
    repeats: int = 3


QUICK = Sizes(width=128, intermediate=320, heads=4, tokens=64, samples=6, begins=3, repeats=1)
# By name, how statistics are collected. A sketch starts when twice as many tokens as directions have been seen.
WAYS: dict[str, dict[str, Any]] = {
    "rank 256 (default)": {"rank": 256},
    "rank 128": {"rank": 128},
    "whole, float64": {"energy": 1.0},
}
QUICK_WAYS = {"rank 256 (default)": {"rank": 16}, "rank 128": {"rank": 8}, "whole, float64": {"energy": 1.0}}


def build(sizes: Sizes, dtype: torch.dtype) -> nn.Module:
    """One decoder layer with LoRA, random weights."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=sizes.width,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=1,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.tokens,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    return get_peft_model(model, MAnyConfig(r=16, target_modules="all-linear")).eval()


def noted(batches: Iterable[Any], begun: list[float]) -> Iterator[Any]:
    """The batches, noting when each is asked for."""
    for batch in batches:
        begun.append(time.perf_counter())
        yield batch


def measure(sizes: Sizes, dtype: torch.dtype, ways: dict[str, dict[str, Any]], bar: Any) -> dict[str, Any]:
    """Seconds a sample without and with collecting, and seconds to finish, by way."""
    model = build(sizes, dtype)
    batches = [
        {"input_ids": torch.randint(0, 64, (1, sizes.tokens)), "attention_mask": torch.ones(1, sizes.tokens).long()}
        for _ in range(sizes.samples)
    ]

    def forward(given: Iterable[Any]) -> None:
        with torch.no_grad():
            for batch in given:
                model(**batch)

    def collect(given: Iterable[Any], options: dict[str, Any]) -> None:
        collect_statistics(model, given, progress=False, **options)

    steps: dict[str, Callable[[Iterable[Any]], None]] = {"forward passes alone": forward}
    steps |= {name: partial(collect, options=options) for name, options in ways.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    finishes: dict[str, list[float]] = {name: [] for name in steps}
    forward(batches[:1])
    for _ in range(sizes.repeats):  # in turns, so that a slow spell of the machine hits all
        for name, step in steps.items():
            begun: list[float] = []
            step(noted(batches, begun))
            samples[name] += [later - earlier for earlier, later in pairwise(begun)][sizes.begins :]
            finishes[name].append(time.perf_counter() - begun[-1])
            bar.update()
    found: dict[str, Any] = {}
    for name in steps:
        sample = statistics.median(samples[name])
        finish = max(0.0, statistics.median(finishes[name]) - sample)
        found[name] = {"seconds_a_sample": sample, "seconds_to_finish": finish}
    plain = found["forward passes alone"]["seconds_a_sample"]
    for row in found.values():
        row["overhead"] = row["seconds_a_sample"] / plain - 1
    return found


def save_plot(path: Any, results: dict[str, dict[str, Any]]) -> None:
    """The overhead by way and dtype."""
    figure, axis = new_figure(1, 1, 7, 3.6)
    for i, (dtype, found) in enumerate(results.items()):
        names = [name for name in found if name != "forward passes alone"]
        places = [x + (i - 0.5) * 0.4 for x in range(len(names))]
        bars = axis.bar(
            places, [100 * found[name]["overhead"] for name in names], 0.38, label=dtype, color=(OURS, OTHERS)[i]
        )
        axis.bar_label(bars, [f"{100 * found[name]['overhead']:.0f} %" for name in names], padding=2, fontsize=8)
        axis.set_xticks(range(len(names)), names)
    axis.axhline(15, color="#444444", linewidth=1, linestyle=":")
    axis.set_ylabel("% over the forward passes alone")
    axis.set_yscale("symlog", linthresh=20)
    axis.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Measure in float32 and bfloat16, print a table, write JSON and the plot."""
    given = parser(__doc__).parse_args()
    torch.set_num_threads(given.threads)
    sizes, ways = (QUICK, QUICK_WAYS) if given.quick else (Sizes(), WAYS)
    results = {}
    with tqdm(total=2 * sizes.repeats * (1 + len(ways)), desc="Measuring", unit="pass") as bar:
        for dtype in (torch.float32, torch.bfloat16):
            results[str(dtype).removeprefix("torch.")] = measure(sizes, dtype, ways, bar)
    table = Table("model", "statistics", title="One decoder layer, for each sample")
    for heading in ("seconds a sample", "overhead", "seconds to finish"):
        table.add_column(heading, justify="right")
    for dtype, found in results.items():
        for name, row in found.items():
            numbers = (f"{row['seconds_a_sample']:.3g}", f"{row['overhead']:.1%}", f"{row['seconds_to_finish']:.2g}")
            table.add_row(dtype, name, *numbers, end_section=name == list(found)[-1])
    console().print(table)
    content = {
        "benchmark": "collection",
        "machine": machine(given.threads),
        "sizes": asdict(sizes),
        "results": results,
    }
    write_json(given.output / "collection.json", content)
    save_plot(given.output / "collection.png", results)


if __name__ == "__main__":
    main()
