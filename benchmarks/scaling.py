"""What collecting and merging take for a 70B model, on paper: bytes and arithmetic from formulas, time from paces.

The formulas count what this package holds, writes and multiplies (`tests/test_scaling.py` holds them against a tiny
collection and a tiny merge). A pace is a measured time divided by the same formulas' arithmetic; a limit is what the
hardware gives at best. Prints the tables of docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from peft_many.algebra.scatter import multiplications, span_is_cheaper
from peft_many.algebra.sketch import MOST_NUMBERS
from peft_many.algebra.spectrum import Truncation
from peft_many.editing.pooling import DEFAULT_POOL_RANK

# What was measured for six tasks of LLaVA-1.5-7B's size: docs/results/merge.json and collection.json on two cores of
# an AMD EPYC; docs/results/gpu-costs.json on one NVIDIA H200.
TWO_CORES_MERGE = 52.3  # seconds, from disk to disk
TWO_CORES_FORWARD = 0.482 * 32 / 704  # seconds a token, bfloat16
H200_MERGE = 4.6
H200_FORWARD = 2.05 / (8 * 8 * 640)
# What the hardware gives at best, by its data sheet.
H200_FLOAT64 = 67e12
DISK = 2.5e9  # bytes a second, of one NVMe drive


@dataclass(frozen=True)
class Sizes:
    """A decoder, its adapters and their statistics. Layers that share their input share one statistic."""

    layers: int = 80
    width: int = 8192
    intermediate: int = 28672
    key_width: int = 1024  # out of k and v, where query heads share them
    tasks: int = 6
    r: int = 16
    statistics_rank: int = 256
    tokens: int = 256 * 640  # of a task, that are measured
    weight_bytes: int = 4  # of an entry of an adapter
    test_bytes: int = 2  # of an entry of the sketch's test matrix, which has the dtype of the products

    def groups(self) -> list[tuple[int, tuple[int, ...]]]:
        """Of one decoder layer: the width of each distinct input, and of the outputs of the layers that read it."""
        d, m = self.width, self.intermediate
        return [(d, (d, self.key_width, self.key_width)), (d, (d,)), (d, (m, m)), (m, (d,))]

    @property
    def followed(self) -> int:
        """Directions of a sketch."""
        return Truncation(rank=self.statistics_rank).followed or 0

    def total(self, of_group: Callable[[int, tuple[int, ...]], float]) -> float:
        """The sum over all inputs."""
        return self.layers * sum(of_group(width, outputs) for width, outputs in self.groups())


SEVEN_B = Sizes(layers=32, width=4096, intermediate=11008, key_width=4096)


def parameters(sizes: Sizes) -> float:
    """Weights of the adapted layers."""
    return sizes.total(lambda width, outputs: width * sum(outputs))


def sketch_bytes(sizes: Sizes) -> float:
    """`Y`, `QᵀQ` and the energy in float64, and `Ω`, of every input: what collecting holds."""
    k = sizes.followed
    return sizes.total(lambda width, _: width * k * (8 + sizes.test_bytes) + 8 * k * k + 8)


def finishing_bytes(sizes: Sizes) -> float:
    """What finishing takes beside that on a GPU: a batch of sketches, at least one."""
    return 32 * max(MOST_NUMBERS, sizes.intermediate * sizes.followed)


def sketch_flops(sizes: Sizes) -> float:
    """Of one token: `X Ω`, `Xᵀ Q` and `Qᵀ Q`."""
    k = sizes.followed
    return sizes.total(lambda width, _: 4 * width * k + 2 * k * k)


def finishing_flops(sizes: Sizes) -> float:
    """A triangular solve, a Gram matrix, its eigendecomposition and the directions."""
    k = sizes.followed
    return sizes.total(lambda width, _: 5 * width * k * k + (9 + 1 / 3) * k**3)


def statistics_bytes(sizes: Sizes) -> float:
    """The factors of one task, in float16."""
    return sizes.total(lambda width, _: 2 * width * sizes.statistics_rank)


def lora_bytes(sizes: Sizes, rank: int, halves: str = "AB") -> float:
    """`A` and `B` of all layers, or one half."""

    def of_group(width: int, outputs: tuple[int, ...]) -> float:
        entries = ("A" in halves) * width * len(outputs) + ("B" in halves) * sum(outputs)
        return rank * entries * sizes.weight_bytes

    return sizes.total(of_group)


def merge_bytes(sizes: Sizes) -> float:
    """A merge on disk: its LoRA, and every task's statistics and own `A`, with which it goes on."""
    kept = statistics_bytes(sizes) + lora_bytes(sizes, sizes.r, "A")
    return lora_bytes(sizes, sizes.tasks * sizes.r) + sizes.tasks * kept


def read_bytes(sizes: Sizes) -> float:
    """What merging reads."""
    return sizes.tasks * (statistics_bytes(sizes) + lora_bytes(sizes, sizes.r))


def solving_bytes(sizes: Sizes) -> float:
    """The largest of the float64 problems: stacked factors and their kernel, or `R` itself."""

    def of_group(width: int, outputs: tuple[int, ...]) -> float:
        rank = sizes.tasks * sizes.statistics_rank
        return 8 * (width**2 if _is_whole(sizes, width, outputs) else rank * width + rank**2)

    return max(of_group(width, outputs) for width, outputs in sizes.groups())


def solving_flops(sizes: Sizes) -> float:
    """Of the exact merge, by the cheaper of its two forms for each input."""
    rank = sizes.tasks * sizes.statistics_rank
    return sizes.total(lambda width, outputs: 2 * multiplications(width, rank, sizes.tasks * sizes.r * len(outputs)))


def _is_whole(sizes: Sizes, width: int, outputs: tuple[int, ...]) -> bool:
    """Whether `R` itself is factored, and not the kernel of the stacked factors."""
    rank, rows = sizes.tasks * sizes.statistics_rank, sizes.tasks * sizes.r * len(outputs)
    return not span_is_cheaper(width, rank, rows)


def measuring_rows(sizes: Sizes) -> Iterator[tuple[str, str, str]]:
    """What measuring one task takes, and where each figure comes from."""
    forward = 2 * parameters(sizes)
    passes = sizes.tokens * forward
    yield "weights of the adapted layers, bfloat16", gigabytes(2 * parameters(sizes)), "computed"
    yield "sums, where the layers are", gigabytes(sketch_bytes(sizes)), "computed"
    yield "beside them while they are finished", gigabytes(finishing_bytes(sizes)), "computed"
    yield "saved statistics", gigabytes(statistics_bytes(sizes)), "computed"
    yield "saved statistics, `dtype=torch.int8`", gigabytes(statistics_bytes(sizes) / 2), "computed, without scales"
    yield "adapter, float32", gigabytes(lora_bytes(sizes, sizes.r)), "computed"
    yield "arithmetic that collecting adds to a forward pass", f"{sketch_flops(sizes) / forward:.1%}", "computed"
    pace = 2 * parameters(SEVEN_B) / H200_FORWARD
    yield f"forward passes, {sizes.tokens:,} tokens, H200", seconds(passes / pace), "from the measured pace of a 7B"
    pace = 2 * parameters(SEVEN_B) / TWO_CORES_FORWARD
    yield "the same on two CPU cores", seconds(passes / pace), "from the measured pace of a 7B"
    yield "arithmetic of finishing, float64", tera(finishing_flops(sizes)), "computed"


def merging_rows(sizes: Sizes) -> Iterator[tuple[str, str]]:
    """What a merge takes."""
    flops, moved = solving_flops(sizes), read_bytes(sizes) + merge_bytes(sizes)
    yield "rank of the merged LoRA", f"{sizes.tasks * sizes.r}"
    yield "reads", gigabytes(read_bytes(sizes))
    yield "writes", gigabytes(merge_bytes(sizes))
    yield "of that the LoRA, float32", gigabytes(lora_bytes(sizes, sizes.tasks * sizes.r))
    yield "float64 memory of the largest input", gigabytes(solving_bytes(sizes))
    yield "float64 arithmetic", tera(flops)
    yield (
        "time on two CPU cores, at the pace of the measured 7B merge",
        seconds(flops / solving_flops(SEVEN_B) * TWO_CORES_MERGE),
    )
    yield (
        "time on an H200, at most: the measured 7B merge, all of it scaled",
        seconds(flops / solving_flops(SEVEN_B) * H200_MERGE),
    )
    yield "limit of its arithmetic, 67 Tflop/s", seconds(flops / H200_FLOAT64)
    yield "limit of one disk, 2.5 GB/s", seconds(moved / DISK)


def growth_rows(sizes: Sizes, tasks: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)) -> Iterator[tuple[str, ...]]:
    """Arithmetic of exact merges, and of pooling tasks as they come, two at a time."""
    pair = replace(sizes, tasks=2, r=(DEFAULT_POOL_RANK + sizes.r) // 2)
    for count in tasks:
        exact = solving_flops(replace(sizes, tasks=count))
        narrow = solving_flops(replace(sizes, tasks=count, statistics_rank=64))
        yield str(count), tera(exact), tera(narrow), tera((count - 1) * solving_flops(pair))


def gigabytes(count: float) -> str:
    """Bytes to be read."""
    return f"{count / 1e9:.3g} GB"


def tera(flops: float) -> str:
    """Arithmetic to be read."""
    return f"{flops / 1e12:.3g} Tflop" if flops < 1e15 else f"{flops / 1e15:.3g} Pflop"


def seconds(count: float) -> str:
    """Time to be read."""
    if count < 100:
        return f"{count:.2g} s"
    return f"{count / 60:.0f} min" if count < 2 * 3600 else f"{count / 3600:.0f} h"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(sizes: Sizes) -> list[str]:
    """Those of the page."""
    many = replace(sizes, tasks=64)
    merging = zip(merging_rows(sizes), merging_rows(many), merging_rows(replace(many, statistics_rank=64)))
    return [
        table(("measuring one task", "", "from"), list(measuring_rows(sizes))),
        table(
            ("merging", f"{sizes.tasks} tasks", f"{many.tasks} tasks", f"{many.tasks} tasks, statistics of rank 64"),
            [(what, one, two, three) for (what, one), (_, two), (_, three) in merging],
        ),
        table(("tasks", "exact", "exact, statistics of rank 64", "pooled as they come"), list(growth_rows(sizes))),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables(Sizes())))
