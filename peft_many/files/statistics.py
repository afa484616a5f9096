"""What was measured of an adapter's tasks, and its file: `adapter_statistics.safetensors` beside the weights."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..algebra.covariance import Covariance
from ..algebra.lpm import LowRankDelta
from ..records.words import counted
from .atomic import replace_file
from .errors import StatisticsError
from .planned_tensors import Planned, TensorPlan, plans_of
from .stored_covariance import read_covariance, read_tensor
from .stored_features import (
    INSTRUCTIONS,
    PROMPTS,
    FeatureStatistics,
    Prompts,
    about_features,
    image_tokens_of,
    read_features,
    read_prompts,
    tensors_of_features,
)
from .tensor_file import TensorFile, open_tensors

STATISTICS_NAME = "adapter_statistics.safetensors"
FORMAT_VERSION = 1
COVARIANCE = "covariance"  # in the keys of tensors


@dataclass(frozen=True)
class InputStatistics:
    """What was measured of one distinct input, which one layer reads or several."""

    covariance: Covariance  # E[x xᵀ]
    tokens: int  # that it is the mean of


@dataclass(frozen=True, repr=False)
class TaskStatistics:
    """What one pass over one task's data measured.

    Args:
        name (`str`, *optional*): The task's name, where the adapter's config gave one.
        samples (`int`): Rows of batches.
        inputs (`Mapping[str, InputStatistics]`): Each by the path of the first layer that reads it.
        input_of (`Mapping[str, str]`): By the path of a layer in the base model, the key in `inputs` of what it reads.
        projectors (`Mapping[str, FeatureStatistics]`): Of the images, by the path of the projector.
        instructions ([`FeatureStatistics`], *optional*): Of what is asked, if token ids told.
        prompts ([`Prompts`], *optional*): Some of what is asked, word for word, if that was to be kept.
        fingerprints (`Mapping[str, Sequence[float]]`):
            By layer, the `weight_fingerprint` of the weights that were measured (or merged): it tells whether they
            were trained further.
        shapes (`Mapping[str, tuple[int, int]]`): `(out, in)` by layer, for PEFT methods whose files do not tell.
        projector_shapes (`Mapping[str, Mapping[str, tuple[int, ...]]]`):
            By projector with a copy of its own, the shapes of the copy's tensors.
        unmoved_projectors (`Mapping[str, Sequence[float]]`):
            By projector that saw no image and whose copy is still the base model's, a fingerprint of that.
        weighed (`bool`): Whether the tokens were weighed by how far they move the answers.
        weight (`float`): `w_t`; other than 1 only inside a merge.
        lora_A (`Mapping[str, torch.Tensor]`): Inside a merge, `A_t` of each trained layer, the LoRA scaling included.
        lora_B (`Mapping[str, torch.Tensor]`):
            Inside a merge, `B_t` of the layers whose merged `B` is not the tasks' side by side.
    """

    name: str | None
    samples: int
    inputs: Mapping[str, InputStatistics] = field(default_factory=dict)
    input_of: Mapping[str, str] = field(default_factory=dict)
    projectors: Mapping[str, FeatureStatistics] = field(default_factory=dict)
    instructions: FeatureStatistics | None = None
    prompts: Prompts | None = None
    fingerprints: Mapping[str, Sequence[float]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    projector_shapes: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    unmoved_projectors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    weighed: bool = False
    weight: float = 1.0
    lora_A: Mapping[str, Tensor] = field(default_factory=dict)
    lora_B: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        inputs = f"{counted(len(self.inputs), 'input')} of {counted(len(self.input_of), 'layer')}"
        seen = f"{counted(self.samples, 'sample')}, {counted(self.images, 'image')}"
        return f"<TaskStatistics of {self.name!r}: {seen}, {inputs}>"

    @property
    def images(self) -> int:
        """Images that were seen."""
        return max((seen.count for seen in self.projectors.values()), default=0)

    @property
    def kept_prompts(self) -> int:
        """Prompts that are kept, word for word."""
        return 0 if self.prompts is None else len(self.prompts.ids)

    @property
    def is_measured(self) -> bool:
        """Whether there are statistics at all; tasks that were never measured can be merged by some methods."""
        return bool(self.inputs or self.projectors)

    @property
    def nbytes(self) -> int:
        """What this takes in a file, in bytes."""
        return sum(tensor.nbytes for _, tensor in _tensors_of(0, self))

    def covariance_of(self, layer: str) -> Covariance | None:
        """The covariance of a layer's input, if it was measured."""
        return self.inputs[self.input_of[layer]].covariance if layer in self.input_of else None

    def tokens_of(self, layer: str) -> int:
        """How many tokens that is the mean of."""
        return self.inputs[self.input_of[layer]].tokens if layer in self.input_of else 0


def group_by_input(layers: Iterable[str], inputs_of: Sequence[Mapping[str, str | None]]) -> list[list[str]]:
    """The layers that read the same input as each other by all of several `input_of`; one that none knows is alone."""
    groups: dict[tuple[str | None, ...] | str, list[str]] = {}
    for layer in layers:
        inputs = tuple(input_of.get(layer) for input_of in inputs_of)
        groups.setdefault(inputs if any(inputs) else layer, []).append(layer)
    return list(groups.values())


class AdapterStatistics:
    """The statistics of an adapter, in `tasks`: of its one task, or of every task that was merged into it."""

    # Large and never changed, so copies of a config share them. No dataclass, since `dataclasses.asdict` copies those.
    def __init__(self, tasks: tuple[TaskStatistics, ...]) -> None:
        self.tasks = tasks
        self._starts: dict[str, list[int]] = {}  # by layer, where each task's columns of the merged `B` begin

    def __repr__(self) -> str:
        return f"AdapterStatistics([{', '.join(map(repr, self.tasks))}])"

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterStatistics:
        return self

    def columns_of(self, t: int, module: str) -> slice | None:
        """Which columns of the merged `B` of a layer are task `t`'s; `None` where they are no longer side by side."""
        if module in self.tasks[t].lora_B:
            return None
        if module not in self._starts:
            ranks = [len(task.lora_A[module]) if module in task.lora_A else 0 for task in self.tasks]
            self._starts[module] = list(itertools.accumulate(ranks, initial=0))
        return slice(*self._starts[module][t : t + 2])

    def own_delta(self, t: int, module: str, merged_B: Tensor) -> LowRankDelta:
        """What task `t` trained in a layer, float32, the LoRA scaling in `A`; `merged_B` is the merge's `B` there."""
        columns = self.columns_of(t, module)
        B = self.tasks[t].lora_B[module] if columns is None else merged_B[:, columns]
        return LowRankDelta(A=self.tasks[t].lora_A[module].float(), B=B.float())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the file into an existing folder, whole or not at all."""
        plan = self.plan()
        with replace_file(Path(folder) / STATISTICS_NAME) as temporary:
            plan.lay_out(temporary)
            plan.write(temporary)

    def plan(self) -> TensorPlan:
        """What the file will hold, a part for each task. How long its header is does not depend on fingerprints."""
        parts = [dict(_tensors_of(t, task)) for t, task in enumerate(self.tasks)]
        return TensorPlan(_metadata_of(self.tasks), _metadata_of([_widest(task) for task in self.tasks]), parts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AdapterStatistics:
        """Read a file, or raise `StatisticsError`. Tensors stay on disk, memory-mapped, until they are used."""
        return cls.of(open_statistics(path))

    @classmethod
    def of(cls, file: TensorFile) -> AdapterStatistics:
        return cls(tuple(_read_tasks(file)))


def open_statistics(path: str | os.PathLike[str]) -> TensorFile:
    """Map a statistics file, or raise `StatisticsError`: it does not exist, is damaged, or is truncated."""
    try:
        return open_tensors(Path(path), StatisticsError)
    except FileNotFoundError:
        raise StatisticsError(f"{path} does not exist.") from None


def _metadata_of(tasks: Sequence[TaskStatistics]) -> dict[str, str]:
    # One entry only: safetensors writes several in an order that changes from file to file.
    return {"peft_many": json.dumps({"version": FORMAT_VERSION, "tasks": [_header_of(task) for task in tasks]})}


def _widest(task: TaskStatistics) -> TaskStatistics:
    """With fingerprints that take the most room."""
    longest = -2.2250738585072014e-308
    return replace(task, fingerprints={name: [longest] * len(known) for name, known in task.fingerprints.items()})


def _header_of(task: TaskStatistics) -> dict[str, Any]:
    return {
        "name": task.name,
        "weight": task.weight,
        "samples": task.samples,
        **({"weighed": True} if task.weighed else {}),
        "inputs": {key: {"tokens": one.tokens, **one.covariance.numbers()} for key, one in task.inputs.items()},
        "input_of": dict(task.input_of),
        "projectors": {name: about_features(seen, "images") for name, seen in task.projectors.items()},
        "instructions": task.instructions and about_features(task.instructions, "count"),
        **({"prompts": task.prompts.to_dict()} if task.prompts is not None else {}),
        "shapes": {name: list(shape) for name, shape in task.shapes.items()},
        "projector_shapes": {
            name: {key: list(shape) for key, shape in shapes.items()} for name, shapes in task.projector_shapes.items()
        },
        "lora_A": list(task.lora_A),
        "lora_B": list(task.lora_B),
        "fingerprints": {name: list(values) for name, values in task.fingerprints.items()},
        "unmoved_projectors": {name: list(values) for name, values in task.unmoved_projectors.items()},
    }


def _tensors_of(t: int, task: TaskStatistics) -> Iterator[tuple[str, Planned]]:
    """What the file holds of a task, by key."""
    for key, measured in task.inputs.items():
        for part, tensor in measured.covariance.tensors().items():
            yield f"{t}.{COVARIANCE}.{key}.{part}", Planned.of(tensor)
    words = {} if task.instructions is None else {INSTRUCTIONS: task.instructions}
    tensors = tensors_of_features({**task.projectors, **words, **image_tokens_of(task.prompts)})
    if task.prompts is not None:
        tensors[PROMPTS] = task.prompts.ids
    yield from ((f"{t}.{key}", Planned.of(tensor)) for key, tensor in tensors.items())
    yield from ((f"{t}.lora_A.{name}", plan) for name, plan in plans_of(task.lora_A))
    yield from ((f"{t}.lora_B.{name}", plan) for name, plan in plans_of(task.lora_B))


def _read_tasks(file: TensorFile) -> Iterator[TaskStatistics]:
    try:
        content = json.loads(file.metadata["peft_many"])
        version, tasks = content["version"], content["tasks"]
    except (KeyError, RecursionError, TypeError, ValueError):
        raise StatisticsError(
            f"{file.path} is not a statistics file of peft_many: its header names no format."
        ) from None
    if type(version) is not int or version != FORMAT_VERSION:
        raise StatisticsError(
            f"{file.path} has statistics format {version}, and this peft_many reads format {FORMAT_VERSION}. "
            "Please upgrade peft_many, or collect the statistics again."
        )
    try:
        for t, task in enumerate(tasks):
            yield _read_task(file, t, task)
    except StatisticsError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise StatisticsError(f"{file.path} is not a statistics file of format {version}: {error!r}.") from None


def _read_task(file: TensorFile, t: int, task: dict[str, Any]) -> TaskStatistics:
    inputs = {
        key: InputStatistics(read_covariance(file, f"{t}.{COVARIANCE}.{key}", about), int(about["tokens"]))
        for key, about in task["inputs"].items()
    }
    for layer, key in task["input_of"].items():
        if key not in inputs:
            raise StatisticsError(f"{file.path}: layer '{layer}' reads an input that the file does not describe.")
    weight, asked = float(task["weight"]), task.get("instructions")
    if not 0 <= weight < math.inf:
        raise StatisticsError(f"{file.path}: a task's weight is {weight}; weights must be finite and not negative.")
    return TaskStatistics(
        name=task["name"],
        weight=weight,
        samples=int(task["samples"]),
        weighed=bool(task.get("weighed", False)),
        inputs=inputs,
        input_of=dict(task["input_of"]),
        projectors={name: read_features(file, t, name, one, "images") for name, one in task["projectors"].items()},
        instructions=read_features(file, t, INSTRUCTIONS, asked, "count") if asked else None,
        prompts=read_prompts(file, t, task["prompts"]) if "prompts" in task else None,
        fingerprints=_read_fingerprints(task["fingerprints"]),
        unmoved_projectors=_read_fingerprints(task.get("unmoved_projectors", {})),
        shapes={name: (int(out), int(width)) for name, (out, width) in task["shapes"].items()},
        projector_shapes={
            name: {key: tuple(map(int, shape)) for key, shape in shapes.items()}
            for name, shapes in task.get("projector_shapes", {}).items()
        },
        lora_A={str(name): read_tensor(file, f"{t}.lora_A.{name}", 2) for name in task["lora_A"]},
        lora_B={str(name): read_tensor(file, f"{t}.lora_B.{name}", 2) for name in task["lora_B"]},
    )


def _read_fingerprints(content: dict[str, Any]) -> dict[str, list[float]]:
    return {name: [float(value) for value in fingerprint] for name, fingerprint in content.items()}
