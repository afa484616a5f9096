"""What constant memory costs: tasks that come without end, pooled into one after each, beside the merge of all.

One layer; the tasks' inputs share half of their energy and differ in the other half. After each task the state, a
delta cut to a rank and one covariance cut to as many directions, is merged with the next task and cut again, as
`peft_many.pool_adapters` does to adapters. The error is the pooled delta's on all tasks' inputs, relative to the
delta that merging all of them at once gives; the residual is what a task's own outputs lose. Writes lifelong.json and
lifelong.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import OTHERS, OURS, console, machine, new_figure, parser, write_json
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from peft_many.algebra.covariance import LowRankCovariance
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta, MergedDelta
from peft_many.algebra.residual import relative_residuals
from peft_many.algebra.spectrum import eigen_directions
from peft_many.algebra.sums import added_covariances


@dataclass(frozen=True)
class Sizes:
    """The layer, the tasks that come, their adapters' rank, and the energy that all tasks' inputs share."""

    width: int = 1024
    out: int = 1024
    tasks: int = 50
    adapter_rank: int = 16
    statistics_rank: int = 256
    shared: float = 0.5


QUICK = Sizes(width=48, out=32, tasks=8, adapter_rank=4, statistics_rank=16)
# By rank of the pooled delta and directions of the pooled covariance.
STATES = ((64, 256), (128, 128), (128, 256), (256, 256), (512, 512))
QUICK_STATES = ((8, 16), (16, 32))

Task = tuple[LowRankCovariance, LowRankDelta]


def make_tasks(sizes: Sizes) -> list[Task]:
    """Random deltas; inputs with eigenvalues 1/i, in directions that are half shared and half the task's own."""
    generator = torch.Generator().manual_seed(0)

    def rotation() -> Tensor:
        return torch.linalg.qr(torch.randn(sizes.width, sizes.width, generator=generator)).Q.double()

    decay = torch.arange(1, sizes.width + 1, dtype=torch.float64).rsqrt()[:, None]
    common = (sizes.shared**0.5 * decay) * rotation()
    made = []
    for _ in range(sizes.tasks):
        own = ((1 - sizes.shared) ** 0.5 * decay) * rotation()
        whole = LowRankCovariance(remainder=0.0, factor=torch.cat([common, own]))
        A = torch.randn(sizes.adapter_rank, sizes.width, generator=generator)
        B = torch.randn(sizes.out, sizes.adapter_rank, generator=generator)
        made.append((eigen_directions(whole).keep(sizes.statistics_rank), LowRankDelta(A=A, B=B)))
    return made


def merge(parts: Sequence[tuple[float, LowRankCovariance, LowRankDelta]], rank: int | None = None) -> LowRankDelta:
    """The merged delta."""
    problem = LeastSquaresMerge()
    for weight, covariance, delta in parts:
        problem.add(covariance, {"layer": delta}, weight)
    return problem.solve(rank)["layer"]


def pooled(tasks: Sequence[Task], rank: int, directions: int, bar: Any) -> list[LowRankDelta]:
    """The state's delta after each task."""
    weight, (covariance, delta) = 1.0, tasks[0]
    states = [delta]
    for next_covariance, next_delta in tasks[1:]:
        delta = merge([(weight, covariance, delta), (1.0, next_covariance, next_delta)], rank)
        shares = [(weight / (weight + 1), covariance), (1 / (weight + 1), next_covariance)]
        covariance = eigen_directions(added_covariances(shares)).keep(directions).in_half_precision()
        weight += 1
        states.append(delta)
        bar.update()
    return states


def measure(sizes: Sizes, states: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Error and residual by number of tasks, for each state, and sizes."""
    tasks = make_tasks(sizes)
    counts = [count for count in (2, 3, 5, 8, 12, 20, 30, 50) if count <= sizes.tasks]
    found: dict[str, Any] = {"tasks": counts, "at_once": [], "states": {}}
    with tqdm(total=len(states) * (sizes.tasks - 1) + len(counts), desc="Measuring", unit="merge") as bar:
        exact = {}
        for count in counts:
            exact[count] = merge([(1.0, covariance, delta) for covariance, delta in tasks[:count]])
            found["at_once"].append(_mean_residual(exact[count], tasks[:count]))
            bar.update()
        for rank, directions in states:
            deltas = pooled(tasks, rank, directions, bar)
            errors, residuals = [], []
            for count in counts:
                delta = deltas[count - 1]
                gap = LowRankDelta(
                    A=torch.cat([delta.A, exact[count].A]), B=torch.cat([delta.B, -exact[count].B], dim=1)
                )
                energies = [(_energy(gap, c), _energy(exact[count], c)) for c, _ in tasks[:count]]
                errors.append((sum(g for g, _ in energies) / sum(w for _, w in energies)) ** 0.5)
                residuals.append(_mean_residual(delta, tasks[:count]))
            found["states"][f"rank {rank}, {directions} directions"] = {
                "error": errors,
                "residual": residuals,
                "bytes": 4 * rank * (sizes.width + sizes.out) + 2 * directions * sizes.width,
            }
    one = 4 * sizes.adapter_rank * (sizes.width + sizes.out) + 2 * sizes.statistics_rank * sizes.width
    found["bytes_a_task"] = one
    return found


def _mean_residual(delta: LowRankDelta, tasks: Sequence[Task]) -> float:
    whole = MergedDelta(A=delta.A, B=delta.B, stacked=False)
    return relative_residuals(whole, [(own, covariance) for covariance, own in tasks]).mean().item()


def _energy(delta: LowRankDelta, covariance: LowRankCovariance) -> float:
    """`‖ΔW C^½‖²`, the mean squared norm of what a delta adds to the layer's outputs."""
    B = delta.B.double()
    return ((B.T @ B) * covariance.moment(delta.A)).sum().clamp(min=0.0).item()


def save_plot(path: Path, found: dict[str, Any]) -> None:
    """The error of each state and the residuals, over the number of tasks."""
    figure, (errors, residuals) = new_figure(1, 2, 11, 4.4)
    for i, (name, state) in enumerate(found["states"].items()):
        shade = 0.3 + 0.7 * (i + 1) / len(found["states"])
        label = f"{name}: {state['bytes'] / found['bytes_a_task']:.1f} tasks' memory"
        errors.plot(found["tasks"], state["error"], marker="o", color=OURS, alpha=shade, label=label)
        residuals.plot(found["tasks"], state["residual"], marker="o", color=OURS, alpha=shade)
    residuals.plot(found["tasks"], found["at_once"], marker="o", color=OTHERS, label="all tasks kept")
    errors.set_title("pooled delta, off the merge of all tasks")
    residuals.set_title("what each task loses (residual)")
    handles, names = (
        one + two for one, two in zip(*(axis.get_legend_handles_labels() for axis in (errors, residuals)))
    )
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    for axis in (errors, residuals):
        axis.set_xlabel("tasks")
        axis.set_ylim(bottom=0)
    figure.savefig(path)


def main() -> None:
    """Measure, print a table, write JSON and the plot."""
    given = parser(__doc__).parse_args()
    torch.set_num_threads(given.threads)
    sizes, states = (QUICK, QUICK_STATES) if given.quick else (Sizes(), STATES)
    found = measure(sizes, states)
    table = Table("state", "memory, in tasks", title=f"{sizes.tasks} tasks, one after the other")
    for heading in ("off the merge of all", "mean residual"):
        table.add_column(heading, justify="right")
    table.add_row("all tasks kept", str(sizes.tasks), "0", f"{found['at_once'][-1]:.3f}", end_section=True)
    for name, state in found["states"].items():
        memory = f"{state['bytes'] / found['bytes_a_task']:.1f}"
        table.add_row(name, memory, f"{state['error'][-1]:.3f}", f"{state['residual'][-1]:.3f}")
    console().print(table)
    content = {"benchmark": "lifelong", "machine": machine(given.threads), "sizes": asdict(sizes), "results": found}
    write_json(given.output / "lifelong.json", content)
    save_plot(given.output / "lifelong.png", found)


if __name__ == "__main__":
    main()
