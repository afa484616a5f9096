"""What routing costs at inference, for 1 to 64 tasks: a call of the routed projector beside one of a plain projector.

The projector is LLaVA-1.5's in float32, the batch 8 images of 576 patches. "Spread" images resemble different tasks,
"one task" means all the same. For few tasks, also what running every task's projector on everything costs. Needs 8 GB
of memory.

Writes routing.json and routing.png.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from operator import truediv
from pathlib import Path

import torch
from common import console, machine, new_figure, parser, seconds_of, write_json
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_many.records import MergeOptions, RoutedProjector, RoutedTask
from peft_many.tuner.projector import ProjectorMixture

TASKS = (1, 2, 4, 8, 16, 32, 64)
ALL_EXPERTS_UP_TO = 4  # where every projector runs on everything, its time is in proportion to the tasks
TEMPERATURE = 1.0  # so high that no task's weight is negligible, and only `top_k` leaves tasks out
IMAGES = 8


@dataclass(frozen=True)
class Sizes:
    """The widths of the projector, the patches of an image, and how often every call is timed."""

    vision: int = 1024
    text: int = 4096
    patches: int = 576
    repetitions: int = 4


QUICK = Sizes(vision=128, text=256, patches=64, repetitions=9)


@dataclass(frozen=True)
class Result:
    """One curve's value at one number of tasks: medians over the repetitions, for one call.

    Args:
        seconds (`float`): The time.
        plain_seconds (`float`): That of one plain projector.
        ratio (`float`): The time in calls of one plain projector, each beside the one of the same repetition: what
            else the machine does comes and goes, and meets both.
    """

    curve: str
    tasks: int
    seconds: float
    plain_seconds: float
    ratio: float


def make_projector(sizes: Sizes) -> nn.Module:
    """LLaVA-1.5's projector."""
    return nn.Sequential(nn.Linear(sizes.vision, sizes.text), nn.GELU(), nn.Linear(sizes.text, sizes.text))


def make_mixture(sizes: Sizes, tasks: int) -> ProjectorMixture:
    """A mixture of random projectors with random prototypes, each with memory of its own."""
    with torch.device("meta"):
        routed = RoutedProjector(sizes.vision, [RoutedTask(str(task), trained=True) for task in range(tasks)])
        mixture = ProjectorMixture(make_projector(sizes), routed, MergeOptions(temperature=TEMPERATURE))
    mixture = mixture.to_empty(device="cpu")
    for parameter in mixture.parameters():
        parameter.data.uniform_(-0.03, 0.03)
    mixture.prototypes.normal_()
    return mixture.eval()


def features_like(prototypes: Tensor, tasks: list[int], sizes: Sizes) -> Tensor:
    """Vision features of one image for each entry of `tasks`, which resembles that task's."""
    noise = torch.randn(len(tasks), sizes.patches, sizes.vision)
    return prototypes[tasks][:, None] + noise


def route(mixture: ProjectorMixture, top_k: int | None, features: Tensor) -> None:
    """One call."""
    mixture.top_k = top_k
    mixture(features)


def calls_to_time(mixture: ProjectorMixture, tasks: int, sizes: Sizes) -> dict[str, Callable[[], object]]:
    """The calls, by the name of their curve."""
    step = max(tasks // IMAGES, 1)
    spread = features_like(mixture.prototypes, [i * step % tasks for i in range(IMAGES)], sizes)
    alike = features_like(mixture.prototypes, [tasks // 2] * IMAGES, sizes)
    calls: dict[str, Callable[[], object]] = {
        f"top_k = {top_k}, {name}": partial(route, mixture, top_k, features)
        for top_k in (1, 2)
        for name, features in (("spread", spread), ("one task", alike))
    }
    if tasks <= ALL_EXPERTS_UP_TO:
        calls["all projectors"] = partial(route, mixture, None, spread)
    return calls


def measure(tasks: int, sizes: Sizes) -> list[Result]:
    """All curves at one number of tasks; the repetitions of all calls, a plain projector's among them, take turns."""
    mixture = make_mixture(sizes, tasks)
    plain_call = partial(mixture.experts["task_0"], torch.randn(IMAGES, sizes.patches, sizes.vision))
    calls: dict[str, Callable[[], object]] = {"plain": plain_call, **calls_to_time(mixture, tasks, sizes)}
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(sizes.repetitions):
        for name, call in calls.items():
            times[name].append(seconds_of(call))
    plain, median = times.pop("plain"), statistics.median
    return [
        Result(curve, tasks, median(own), median(plain), median(map(truediv, own, plain)))
        for curve, own in times.items()
    ]


def draw(results: list[Result], path: Path) -> None:
    """All curves over the number of tasks."""
    figure, axes = new_figure(1, 1, 7, 4.2)
    for curve in dict.fromkeys(result.curve for result in results):
        points = [result for result in results if result.curve == curve]
        style = ":" if curve == "all projectors" else "--" if "one task" in curve else "-"
        axes.plot([p.tasks for p in points], [p.ratio for p in points], style, marker="o", markersize=4, label=curve)
    axes.set_xscale("log", base=2)
    axes.set_xticks(TASKS, [str(tasks) for tasks in TASKS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tasks")
    axes.set_ylabel("time of a call, in calls of one plain projector")
    axes.legend(frameon=False, ncols=2)
    figure.savefig(path)


def main() -> None:
    """Measure, print a table, write JSON and the plot."""
    given = parser(__doc__).parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    sizes = QUICK if given.quick else Sizes()
    results: list[Result] = []
    with torch.inference_mode():
        for tasks in tqdm(TASKS, desc="Measuring", unit="number of tasks"):
            results += measure(tasks, sizes)
    curves = list(dict.fromkeys(result.curve for result in results))
    table = Table("tasks", *curves, title="Time of a call, in calls of one plain projector")
    for tasks in TASKS:
        ratios = {result.curve: f"{result.ratio:.2f}" for result in results if result.tasks == tasks}
        table.add_row(str(tasks), *(ratios.get(curve, "") for curve in curves))
    console().print(table)
    content = {
        "benchmark": "routing",
        "machine": machine(given.threads),
        "sizes": {**asdict(sizes), "images": IMAGES},
        "results": [asdict(result) for result in results],
    }
    write_json(given.output / "routing.json", content)
    draw(results, given.output / "routing.png")


if __name__ == "__main__":
    main()
