"""Runs the benchmark: every method on every seed; what is measured already is not measured again."""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from peft_many.files.atomic import replace_file
from peft_many.metrics import AccuracyMatrix
from peft_many.version import __version__

from .ablations import ablations
from .gates import gates, hard_methods
from .hard_tasks import ALL
from .methods import METHODS, Measurement
from .model import MODELS, TinyModel
from .plain_merge import plain_merges
from .prediction import predictions
from .pretraining import pretrain
from .routers import routers
from .tasks import TASKS
from .workshop import Workshop
from .world import Task


@dataclass(frozen=True)
class Settings:
    """How large a run is; runs of other settings are not comparable.

    Args:
        steps (`int`): Training steps for each task, the same for all methods.
        tests (`int`): Test pictures for each task.
        tasks (`Sequence[Task]`): In the order in which they come.
        pretraining_steps (`int`): For models whose weights do not come with the package.
        results_name (`str`): The file that results are written to.
    """

    steps: int = 450
    tests: int = 300
    tasks: Sequence[Task] = field(default=TASKS)
    pretraining_steps: int = 6_000
    results_name: str = "results.json"

    def to_dict(self) -> dict[str, Any]:
        """For the results, as JSON."""
        about = {"steps": self.steps, "tests": self.tests, "tasks": [task.name for task in self.tasks]}
        kinds = {task.name: task.kind for task in self.tasks}
        return {**about, "kinds": kinds} if len({*kinds.values()}) > 1 else about


# By what the command calls it: the six tasks, which look different, and with them those that are hard to tell apart.
# Both keep their adapters in one place, so that the six are trained once.
SUITES = {"six": Settings(), "hard": Settings(tasks=ALL, results_name="hard.json")}


@dataclass
class Results:
    """What one model and seed gave, and the file it is in.

    Args:
        path (`Path`): The JSON file.
        about (`dict[str, Any]`): Model, seed, settings and versions.
        scores (`dict[str, list[list[float]]]`):
            By method the accuracy in per cent: a row for each stage, or one row for the last.
        seconds (`dict[str, float]`): By method, how long making and asking it took, training of its own included.
        base (`dict[str, dict[str, float]]`): By method, what is left of the base model's skills ([`BaseSkills`]).
    """

    path: Path
    about: dict[str, Any]
    scores: dict[str, list[list[float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    base: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """What an earlier run wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(path, content["about"], content["scores"], content["seconds"], content.get("base", {}))

    def write(self) -> None:
        """Write the file, whole or not at all."""
        content = {"about": self.about, "scores": self.scores, "seconds": self.seconds, "base": self.base}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(self.path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def final(self, method: str) -> dict[str, float]:
        """By task, the accuracy after the last stage."""
        return dict(zip(self.about["tasks"], self.scores[method][-1]))

    def matrix(self, method: str) -> AccuracyMatrix | None:
        """The accuracy matrix, if the method was asked after every stage."""
        rows = self.scores[method]
        tasks = self.about["tasks"]
        return AccuracyMatrix(rows, tasks) if len(rows) == len(tasks) else None


def run(
    output: Path,
    models: Iterable[str],
    seeds: Iterable[int],
    settings: Settings,
    methods: Iterable[Measurement],
) -> list[Results]:
    """Measure every method on every model and seed and write `<output>/<model>/seed<seed>/<results_name>`.

    Adapters are kept beside the results, so that a run that was interrupted goes on where it stopped.

    Raises:
        ValueError: `output` holds results of other settings.
    """
    chosen = list(methods)
    found = []
    for name in models:
        tiny = MODELS[name]
        weights = _weights_of(tiny, output, settings)
        for seed in seeds:
            folder = output / name / f"seed{seed}"
            shop = Workshop(tiny, weights, settings.tasks, folder / "adapters", seed, settings.steps, settings.tests)
            results = _begun(folder / settings.results_name, name, seed, settings)
            waiting = [method for method in chosen if method.name not in results.scores]
            for method in tqdm(waiting, desc=f"{name}, seed {seed}", unit="method"):
                started = time.perf_counter()
                measured = method.measure(shop)
                results.scores[method.name] = measured.scores
                if measured.base is not None:
                    results.base[method.name] = asdict(measured.base)
                results.seconds[method.name] = round(time.perf_counter() - started, 1)
                results.write()
                gc.collect()  # models are full of cycles
            found.append(results)
    return found


def all_methods(suite: str = "six") -> Iterator[Measurement]:
    """Every method, plain merges made better, every ablation, what residuals predict, and every way of routing.

    Of the hard half, its own.
    """
    if suite == "hard":
        yield from hard_methods()
        return
    yield from METHODS.values()
    yield from gates()
    yield from plain_merges()
    yield from ablations()
    yield from predictions()
    yield from routers()


def _weights_of(tiny: TinyModel, output: Path, settings: Settings) -> Path | None:
    """Where the pre-trained weights are; they are made if need be."""
    if tiny.checkpoint is not None:
        return None
    folder = output / "models" / tiny.name
    if not folder.exists():
        pretrain(tiny, folder, settings.pretraining_steps)
    return folder


def _begun(path: Path, model: str, seed: int, settings: Settings) -> Results:
    about = {"model": model, "seed": seed, **settings.to_dict()}
    if path.exists():
        results = Results.read(path)
        differing = [name for name, value in about.items() if results.about.get(name) != value]
        if differing:
            known, wanted = ({name: of[name] for name in differing} for of in (results.about, about))
            raise ValueError(f"'{path}' holds results of {known}, not of {wanted}; choose another output folder.")
        return results
    packages = ("torch", "transformers", "peft")
    environment = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **{package: version(package) for package in packages},
        "peft_many": __version__,
    }
    return Results(path, {**about, "environment": environment})
