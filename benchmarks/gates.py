"""What gates cost at inference, for 1 to 64 tasks: calls of a gated merge beside the same calls of one adapter.

A LLaVA of width 1024 in float32, of two layers, on two images with 32 words each. Ranks are to the width what r = 16
is to that of a 7B model. "Spread" rows belong to different tasks, "one task" means all the same.

Writes gates.json and gates.png.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from common import console, machine, new_figure, parser, seconds_of, write_json
from peft import PeftModel
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu.model import Batch, adapted, batch, build
from benchmarks.gpu.sizes import CHECKED, ModelSizes
from peft_many import collect_statistics, merge_adapter_sequence
from peft_many.routing.task_router import InstructionRouter, TaskRouter

TASKS = (1, 6, 24, 64)
GATES = ("images", "instructions", "both")
CALLS = ("forward", "generate")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """The model, the rank of a task, what is generated, and how often every call is timed."""

    model: ModelSizes
    r: int = 4
    new_tokens: int = 32
    repetitions: int = 5


WIDE = ModelSizes(
    vision={**CHECKED.vision, "image_size": 112},
    text={**CHECKED.text, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2},
    rows=2,
    words=32,
)
FULL = Sizes(WIDE)
QUICK = Sizes(replace(CHECKED, rows=2), new_tokens=2, repetitions=1)


@dataclass(frozen=True)
class Result:
    """What one kind of call takes at one number of tasks: medians over the repetitions.

    Args:
        seconds (`float`): The time.
        plain_seconds (`float`): That of one adapter.
        ratio (`float`): The time in calls of one adapter, each beside the one of the same repetition.
    """

    call: str
    gate_by: str
    rows: str
    tasks: int
    seconds: float
    plain_seconds: float
    ratio: float


def make_adapters(sizes: Sizes, scratch: Path) -> list[Path]:
    """As many as the most tasks, measured on a batch each."""
    base, folders = build(sizes.model, CPU, torch.float32), [scratch / str(task) for task in range(TASKS[-1])]
    for task, folder in enumerate(tqdm(folders, desc="Making adapters")):
        model = adapted(base, task, sizes.r, 0.1)
        collect_statistics(model, [batch(sizes.model, CPU, torch.float32, task)], rank=8, progress=False)
        model.save_pretrained(folder)
        base = model.unload()
    return folders


def gated(sizes: Sizes, folders: list[Path], gate_by: str) -> PeftModel:
    """A merge."""
    base = build(sizes.model, CPU, torch.float32)
    return merge_adapter_sequence(base, folders, gate_by=gate_by, progress=False).eval()


@torch.no_grad()
def assign(model: PeftModel, given: Batch, owners: list[int]) -> None:
    """Let each row of a batch be like another task's, by its picture and by its words."""
    for router in [part for part in model.modules() if isinstance(part, TaskRouter)]:
        seen: list[Tensor] = []
        name = "scores" if isinstance(router, InstructionRouter) else "task_weights"
        find: Callable[[Tensor], Tensor] = getattr(router, name)
        router.__dict__[name] = lambda features, find=find, seen=seen: seen.append(features) or find(features)
        model(**given)
        router.__dict__.pop(name)
        router.prototypes.normal_().mul_(10 * seen[0].abs().mean())
        router.prototypes[owners] = seen[0][: len(owners)].to(router.prototypes)


def calls_of(model: PeftModel, given: Batch, sizes: Sizes) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls, by name."""
    tokens = {"max_new_tokens": sizes.new_tokens, "min_new_tokens": sizes.new_tokens, "do_sample": False}
    yield "forward", partial(model, **given)
    yield "generate", partial(model.generate, **given, **tokens)


def measure(folders: list[Path], sizes: Sizes, gate_by: str) -> Iterator[Result]:
    """Both calls, rows of one task and of several; calls of the merge and of one adapter take turns."""
    given = batch(sizes.model, CPU, torch.float32, 0, seed=7)
    one = PeftModel.from_pretrained(build(sizes.model, CPU, torch.float32), folders[0]).eval()
    merge, rows, tasks = gated(sizes, folders, gate_by), sizes.model.rows, len(folders)
    spread = {"spread": [row * (tasks - 1) // (rows - 1) for row in range(rows)]} if tasks > 1 else {}
    for name, owners in {"one task": [tasks // 2] * rows, **spread}.items():
        assign(merge, given, owners)
        for (call, own), (_, plain) in zip(calls_of(merge, given, sizes), calls_of(one, given, sizes)):
            own(), plain()
            times = [(seconds_of(own), seconds_of(plain)) for _ in range(sizes.repetitions)]
            seconds, plain_seconds = (statistics.median(side) for side in zip(*times))
            ratio = statistics.median(truediv(*pair) for pair in times)
            yield Result(call, gate_by, name, tasks, seconds, plain_seconds, ratio)


def draw(results: list[Result], path: Path) -> None:
    """Both calls over the number of tasks."""
    figure, both = new_figure(1, 2, 9, 3.8)
    for axes, call in zip(both, CALLS):
        for gate_by in GATES:
            for rows, style in (("one task", "-"), ("spread", "--")):
                points = [one for one in results if (one.call, one.gate_by, one.rows) == (call, gate_by, rows)]
                label = f"{gate_by}, {rows}"
                axes.plot([p.tasks for p in points], [p.ratio for p in points], style, marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(TASKS, [str(tasks) for tasks in TASKS])
        axes.set_xlabel("tasks")
        axes.set_title(call)
    both[0].set_ylabel("time of a call, in calls of one adapter")
    both[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Measure, print a table, write JSON and the plot."""
    given = parser(__doc__).parse_args()
    torch.set_num_threads(given.threads)
    sizes = QUICK if given.quick else FULL
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_adapters(sizes, Path(scratch))
        with torch.no_grad():
            for tasks in tqdm(TASKS, desc="Measuring", unit="number of tasks"):
                for gate_by in GATES:
                    results += measure(folders[:tasks], sizes, gate_by)
    table = Table("call", "gates by", "rows", *map(str, TASKS), title="Time of a call, in calls of one adapter")
    for key in dict.fromkeys((one.call, one.gate_by, one.rows) for one in results):
        found = {one.tasks: f"{one.ratio:.2f}" for one in results if (one.call, one.gate_by, one.rows) == key}
        table.add_row(*key, *(found.get(tasks, "") for tasks in TASKS))
    console().print(table)
    about = {"benchmark": "gates", "machine": machine(given.threads), "sizes": asdict(sizes)}
    write_json(given.output / "gates.json", {**about, "results": [asdict(one) for one in results]})
    draw(results, given.output / "gates.png")


if __name__ == "__main__":
    main()
