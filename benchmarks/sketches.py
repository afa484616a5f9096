"""Which streaming sketch of a covariance: error and time of four of them at the same rank.

`peft_many`'s sketch beside a Nyström sketch with a Gaussian test matrix, Frequent Directions (arXiv 1501.01711) and
incremental SVD, each following `size` directions, cut to `rank`, with the discarded energy spread evenly. The inputs
are tokens with spectra as layers have them: falling slowly and quickly, with rare massive outliers, and with a
distribution that drifts. For each, the spectral error as a share of the trace, and the error of the merged delta of
three tasks on the tasks' inputs, both beside the best truncation of the same rank.

Writes sketches.json and sketches.png.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import OTHERS, OURS, console, machine, new_figure, parser, write_json
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from peft_many.algebra.covariance import Covariance, LowRankCovariance
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta
from peft_many.algebra.sketch import CovarianceAccumulator, CovarianceSketch, _Sums
from peft_many.algebra.spectrum import Spectrum, eigen_directions

TASKS = 3


@dataclass(frozen=True)
class Sizes:
    """The width of the layer, the rank that is kept, the directions that are followed, tokens, and tokens a batch."""

    width: int = 1024
    rank: int = 64
    size: int = 80
    tokens: int = 8_000
    batch: int = 700


QUICK = Sizes(width=96, rank=12, size=15, tokens=900, batch=100)


class Gaussian(CovarianceSketch):
    """The same with a random test matrix, as in the literature."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width, size)
        self._sums = _Sums(torch.linalg.qr(torch.randn(width, size)).Q)


class Incremental:
    """Keeps a factor of `size` rows: stack new tokens below it, decompose, keep the leading `size` (incremental SVD).

    With `shrink` the energy of the first direction left out is taken off all that stay (Frequent Directions).
    """

    shrink = False

    def __init__(self, width: int, size: int) -> None:
        self.factor, self.size = torch.zeros(0, width, dtype=torch.float64), size
        self.tokens, self.energy = 0, 0.0

    def update(self, inputs: Tensor) -> None:
        """Add tokens, `size` of them at a time."""
        self.tokens, self.energy = self.tokens + len(inputs), self.energy + inputs.double().square().sum().item()
        for rows in inputs.double().split(self.size):
            stacked = torch.cat([self.factor, rows])
            values, mixing = torch.linalg.eigh(stacked @ stacked.T)
            values, mixing = values.flip(0).clamp(min=1e-300), mixing.flip(1)
            taken = values[self.size] if self.shrink and len(values) > self.size else 0.0
            kept = ((values - taken).clamp(min=0.0) / values).sqrt()[: self.size]
            self.factor = kept[:, None] * (mixing[:, : self.size].T @ stacked)

    def result(self) -> LowRankCovariance:
        """The mean of `x xᵀ`."""
        energies = self.factor.square().sum(1)
        directions = self.factor / energies.clamp(min=1e-300).sqrt()[:, None]
        rest = max(0.0, self.energy - energies.sum().item()) / self.tokens
        return Spectrum(energies / self.tokens, directions, rest).keep(self.size)


class FrequentDirections(Incremental):
    """Liberty 2013, Ghashami et al. 2016."""

    shrink = True


SKETCHES: dict[str, Callable[[int, int], Any]] = {
    "peft_many": CovarianceSketch,
    "Gaussian Nyström": Gaussian,
    "Frequent Directions": FrequentDirections,
    "incremental SVD": Incremental,
}
BEST = "best truncation"


def tokens_of(kind: str, sizes: Sizes, seed: int) -> Tensor:
    """Inputs of a layer, shape `(tokens, width)`, with a direction that all tasks share."""
    generator = torch.Generator().manual_seed(seed)
    decay = {"slow decay": 0.5, "quick decay": 2.0}.get(kind, 1.0)
    rows = torch.randn(sizes.tokens, sizes.width, generator=generator)
    rows *= torch.arange(1, sizes.width + 1.0) ** (-decay / 2)
    if kind == "drift":  # each tenth of the tokens excites directions of its own
        for part, some in enumerate(rows.chunk(10)):
            some[:, part * sizes.width // 20 : (part + 1) * sizes.width // 20] *= 4
    rows = rows @ torch.linalg.qr(torch.randn(sizes.width, sizes.width, generator=generator)).Q
    rows += rows.square().mean().sqrt() * 2 * torch.randn(sizes.width, generator=torch.Generator().manual_seed(99))
    if kind == "outliers":  # one token in 500, in two features, as language models have
        rows[torch.rand(sizes.tokens, generator=generator) < 0.002, :2] += 1000 * rows.square().mean().sqrt()
    return rows


KINDS = ("slow decay", "medium decay", "quick decay", "outliers", "drift")


def sketch(make: Callable[[int, int], Any], rows: Tensor, sizes: Sizes) -> tuple[LowRankCovariance, float]:
    """The sketch's covariance of the given rank, and the time it took."""
    start = time.perf_counter()
    running = make(sizes.width, sizes.size)
    for batch in rows.split(sizes.batch):
        running.update(batch)
    result = eigen_directions(running.result()).keep(sizes.rank)
    return result, time.perf_counter() - start


def merged(covariances: Sequence[Covariance], deltas: Sequence[LowRankDelta]) -> Tensor:
    """The merged delta, dense."""
    problem = LeastSquaresMerge()
    for covariance, delta in zip(covariances, deltas):
        problem.add(covariance, {"layer": delta})
    return problem.solve()["layer"].dense()


def spectral_norm(matrix: Tensor, steps: int = 50) -> float:
    """Of a symmetric matrix, by power iteration."""
    vector = torch.randn(len(matrix), dtype=matrix.dtype)
    for _ in range(steps):
        vector = torch.nn.functional.normalize(matrix @ vector, dim=0)
    return (matrix @ vector).norm().item()


def measure(kind: str, sizes: Sizes, bar: Any) -> list[dict[str, Any]]:
    """One row for each sketch and the best truncation."""
    tasks = [tokens_of(kind, sizes, seed) for seed in range(TASKS)]
    exact = []
    for rows in tasks:
        whole = CovarianceAccumulator(sizes.width)
        whole.update(rows)
        exact.append(whole.result())
    generator = torch.Generator().manual_seed(5)
    deltas = [
        LowRankDelta(torch.randn(16, sizes.width, generator=generator), torch.randn(256, 16, generator=generator))
        for _ in tasks
    ]
    optimum, root = merged(exact, deltas), torch.linalg.cholesky(sum(c.with_ridge(1e-9).dense() for c in exact))

    def row(name: str, found: Sequence[LowRankCovariance], seconds: float) -> dict[str, Any]:
        gaps = [spectral_norm(one.dense() - two.dense()) / two.trace for one, two in zip(found, exact)]
        error = ((merged(found, deltas) - optimum) @ root).norm() / (optimum @ root).norm()
        bar.update()
        return {
            "inputs": kind,
            "sketch": name,
            "spectral_error": max(gaps),
            "delta_error": error.item(),
            "seconds": seconds,
        }

    results = [row(BEST, [eigen_directions(covariance).keep(sizes.rank) for covariance in exact], 0.0)]
    for name, make in SKETCHES.items():
        found = [sketch(make, rows, sizes) for rows in tasks]
        results.append(row(name, [one for one, _ in found], statistics.mean(seconds for _, seconds in found)))
    return results


def save_plot(path: Any, results: Sequence[dict[str, Any]]) -> None:
    """Bars of the error of the merged delta, and of the time."""
    figure, (errors, times) = new_figure(1, 2, 12, 4)
    names = [BEST, *SKETCHES]
    colours = dict(zip(names, ("#444444", OURS, OTHERS, "#5c677d", "#33415c")))
    for axis, key, chosen in ((errors, "delta_error", names), (times, "seconds", list(SKETCHES))):
        for i, name in enumerate(chosen):
            values = [row[key] for row in results if row["sketch"] == name]
            places = [x + (i - len(chosen) / 2 + 0.5) * 0.8 / len(chosen) for x in range(len(values))]
            axis.bar(places, values, width=0.8 / len(chosen), color=colours[name], label=name)
        axis.set_xticks(range(len(KINDS)), KINDS)
        axis.grid(axis="x", visible=False)
    errors.set_title("error of the merged delta on the tasks' inputs")
    figure.legend(*errors.get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    times.set_title("seconds for the tokens of one task")
    times.set_yscale("log")
    figure.savefig(path)


def main() -> None:
    """Measure all, print a table, write JSON and the plot."""
    given = parser(__doc__).parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    sizes = QUICK if given.quick else Sizes()
    results: list[dict[str, Any]] = []
    with tqdm(total=len(KINDS) * (1 + len(SKETCHES)), desc="Measuring", unit="sketch") as bar:
        for kind in KINDS:
            results += measure(kind, sizes, bar)
    table = Table("inputs", "sketch", title=f"Rank {sizes.rank} of {sizes.width}, {sizes.tokens} tokens")
    for heading in ("spectral error / trace", "error of the merged delta", "seconds"):
        table.add_column(heading, justify="right")
    for row in results:
        numbers = (f"{row['spectral_error']:.5f}", f"{row['delta_error']:.4f}", f"{row['seconds']:.2f}")
        table.add_row(row["inputs"], row["sketch"], *numbers, end_section=row["sketch"] == "incremental SVD")
    console().print(table)
    content = {
        "benchmark": "sketches",
        "machine": machine(given.threads),
        "sizes": asdict(sizes),
        "tasks": TASKS,
        "results": results,
    }
    write_json(given.output / "sketches.json", content)
    save_plot(given.output / "sketches.png", results)


if __name__ == "__main__":
    main()
