"""What was measured of an adapter's tasks, and its file: `adapter_statistics.safetensors` beside the weights."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..algebra.covariance import Covariance, DenseCovariance, InvalidCovarianceError, LowRankCovariance
from ..algebra.eight_bits import Scales
from ..algebra.lpm import LowRankDelta
from ..algebra.spectrum import truncate
from .atomic import replace_file
from .errors import AdapterFileError
from .tensor_file import TensorFile, TensorFileWriter, lay_out

STATISTICS_NAME = "adapter_statistics.safetensors"
FORMAT_VERSION = 4
# 1 knew neither scaled factors nor merges of lower rank, 2 no spreads, 3 no factors in eight bits.
READABLE_VERSIONS = (1, 2, 3, 4)
DEFAULT_ENERGY = 0.9999
LARGEST_FINGERPRINTED = 1 << 20


class StatisticsError(AdapterFileError):
    """A statistics file cannot be used; the message says which one, which tensor and why."""


@dataclass(frozen=True)
class TaskStatistics:
    """What one forward-only pass over one task's data measured.

    Args:
        name (`str`, *optional*): The task's name, where the adapter's config gave one.
        samples (`int`): Rows of batches that were seen.
        images (`int`): Images that were seen.
        covariances (`Mapping[str, Covariance]`):
            By the path of the layer in the base model. Layers that share their input share one object.
        prototypes (`Mapping[str, torch.Tensor]`):
            By the path of the projector: mean over images of the mean-pooled projector input, shape `(d,)`, float32.
        spreads (`Mapping[str, Covariance]`):
            By the path of the projector: the covariance of these features about the prototype, `d × d`, with images
            for tokens; not there if there was a single image, or in files of before format 3.
        fingerprints (`Mapping[str, Sequence[float]]`):
            By layer, the `weight_fingerprint` of the adapter's weights when the task was measured (or merged): a later
            training run makes the statistics stale, and this tells.
        shapes (`Mapping[str, tuple[int, int]]`):
            `(out, in)` of each adapted layer, in the order of the model, where the adapter is of a PEFT method whose
            file does not tell.
        weight (`float`): `w_t`; other than 1 only inside a merge.
        deltas (`Mapping[str, torch.Tensor]`):
            Inside a merge, each trained layer's `A_t` with the LoRA scaling folded in, shape `(r_t, in)`.
        lora_B (`Mapping[str, torch.Tensor]`):
            Inside a merge, `B_t` of shape `(out, r_t)` for the layers whose merged `B` is not the tasks' side by side.
    """

    name: str | None
    samples: int
    images: int
    covariances: Mapping[str, Covariance]
    prototypes: Mapping[str, Tensor]
    spreads: Mapping[str, Covariance] = field(default_factory=dict)
    fingerprints: Mapping[str, Sequence[float]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    weight: float = 1.0
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    lora_B: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        """Whether there are statistics at all; tasks that were never measured can be merged by some methods."""
        return bool(self.covariances or self.prototypes)

    @property
    def nbytes(self) -> int:
        """What this takes in a file, in bytes; covariances that are still whole become smaller there."""
        return sum(tensor.nbytes for _, tensor in _tensors_of(0, self, self.groups()))

    def groups(self) -> list[tuple[Covariance, list[str]]]:
        """Each distinct covariance with the layers whose input it describes."""
        grouped: dict[int, tuple[Covariance, list[str]]] = {}
        for module, covariance in self.covariances.items():
            grouped.setdefault(id(covariance), (covariance, []))[1].append(module)
        return list(grouped.values())


@dataclass(frozen=True)
class AdapterStatistics:
    """The statistics of an adapter: of its one task, or of every task that was merged into it."""

    tasks: tuple[TaskStatistics, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterStatistics:
        return self  # Immutable, and large: `dataclasses.asdict` and copies of a config need not copy it.

    def own_delta(self, t: int, module: str, merged_B: Tensor) -> LowRankDelta:
        """A task's own delta in a layer of the merge, float32, with the LoRA scaling in `A`.

        Args:
            t (`int`): Which task.
            module (`str`): The layer, which the task trained.
            merged_B (`torch.Tensor`): The merge's `B`, whose columns are the tasks' unless they are stored apart.
        """
        A, B = self.tasks[t].deltas[module], self.tasks[t].lora_B.get(module)
        if B is None:
            start = sum(len(task.deltas[module]) for task in self.tasks[:t] if module in task.deltas)
            B = merged_B[:, start : start + len(A)]
        return LowRankDelta(A=A.float(), B=B.float())

    def save(
        self, folder: str | os.PathLike[str], energy: float = DEFAULT_ENERGY, *, sources: Iterable[TensorFile] = ()
    ) -> None:
        """Write the file into `folder`, whole or not at all.

        Covariances that were collected whole are truncated to `energy` (MAny*, float16 factors); with `energy=1.0`
        they are kept whole in float64. Those that are truncated already are written as they are.

        Args:
            folder (`str`): An existing folder.
            energy (`float`): The share of the energy to keep, in (0, 1].
            sources (`Iterable[TensorFile]`):
                Files that the tensors are mapped from; their memory is given back after each task.
        """
        compact = [[(_compact(c, energy), modules) for c, modules in task.groups()] for task in self.tasks]
        header = [_header_of(task, groups) for task, groups in zip(self.tasks, compact)]
        # One entry only: safetensors writes several in an order that changes from file to file.
        metadata = {"peft_many": json.dumps({"version": FORMAT_VERSION, "tasks": header})}
        announced: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for t, (task, groups) in enumerate(zip(self.tasks, compact)):
            announced |= {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in _tensors_of(t, task, groups)}
        with replace_file(Path(folder) / STATISTICS_NAME) as temporary:
            lay_out(temporary, announced, metadata)
            with TensorFileWriter(temporary) as writer:
                for t, (task, groups) in enumerate(zip(self.tasks, compact)):
                    for key, tensor in _tensors_of(t, task, groups):
                        writer.write(key, tensor)
                    for source in sources:
                        source.release()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AdapterStatistics:
        """Read a statistics file. Tensors stay on disk, memory-mapped, until they are used.

        Raises:
            StatisticsError: The file is damaged, of another format, or lacks a tensor.
        """
        return cls.of(open_statistics(path))

    @classmethod
    def of(cls, file: TensorFile) -> AdapterStatistics:
        """As `load`, of a file that was opened with `open_statistics`."""
        return cls(tuple(_read_tasks(file)))


def open_statistics(path: str | os.PathLike[str]) -> TensorFile:
    """Map a statistics file.

    Raises:
        StatisticsError: It does not exist, is damaged, or is truncated.
    """
    try:
        return TensorFile(Path(path))
    except FileNotFoundError:
        raise StatisticsError(f"{path} does not exist.") from None
    except SafetensorError as error:
        raise StatisticsError(f"{path} is damaged or truncated ({error}).") from None


Groups = Sequence[tuple[Covariance, list[str]]]


def _compact(covariance: Covariance, energy: float) -> Covariance:
    if isinstance(covariance, DenseCovariance) and energy < 1.0:
        return truncate(covariance, energy).in_half_precision()
    return covariance


def _about(covariance: Covariance) -> dict[str, Any]:
    about: dict[str, Any] = {"tokens": covariance.tokens, "remainder": covariance.remainder}
    return about | {"scale": covariance.scale} if isinstance(covariance, LowRankCovariance) else about


def _header_of(task: TaskStatistics, groups: Groups) -> dict[str, Any]:
    return {
        "name": task.name,
        "weight": task.weight,
        "samples": task.samples,
        "images": task.images,
        "covariances": [{"modules": modules, **_about(covariance)} for covariance, modules in groups],
        "projectors": list(task.prototypes),
        "spreads": {name: _about(spread) for name, spread in task.spreads.items()},
        "shapes": {name: list(shape) for name, shape in task.shapes.items()},
        "deltas": list(task.deltas),
        "lora_B": list(task.lora_B),
        "fingerprints": {name: list(values) for name, values in task.fingerprints.items()},
    }


def _tensors_of(t: int, task: TaskStatistics, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """What the file holds of a task, by key; each is read when its turn comes."""
    of_images = [(f"spread.{name}", spread) for name, spread in task.spreads.items()]
    for key, covariance in [*((f"covariance.{g}", of_layers) for g, (of_layers, _) in enumerate(groups)), *of_images]:
        if isinstance(covariance, DenseCovariance):
            yield f"{t}.{key}.matrix", covariance.matrix
        elif isinstance(covariance, LowRankCovariance):
            yield f"{t}.{key}.factor", covariance.factor
            if covariance.scales is not None:
                yield f"{t}.{key}.row_scales", covariance.scales.rows
                yield f"{t}.{key}.column_exponents", covariance.scales.columns
    for kind, tensors in (("prototype", task.prototypes), ("lora_A", task.deltas), ("lora_B", task.lora_B)):
        for name, tensor in tensors.items():
            yield f"{t}.{kind}.{name}", tensor


def weight_fingerprint(A: Tensor, B: Tensor) -> list[float]:
    """Nine numbers that move with any change of a LoRA's weights, and hardly with a cast to another dtype.

    The norm of `B`, and the components of `A` and `B`, each of norm one, along four fixed directions: a norm alone
    moves in second order only. A factor on `A`, such as the LoRA scaling, changes nothing.
    """
    return [B.float().norm().item(), *_components(A), *_components(B)]


def tensors_fingerprint(tensors: Sequence[Tensor]) -> list[float]:
    """As `weight_fingerprint`, of any tensors: the norm of all, and four components of each.

    Of large tensors, which layers share, a part has to do.
    """
    parts = [tensor.flatten()[:LARGEST_FINGERPRINTED] for tensor in tensors]
    norm = math.hypot(*(part.float().norm().item() for part in parts))
    return [norm, *(component for part in parts for component in _components(part))]


def same_weights(one: Sequence[float], two: Sequence[float]) -> bool:
    """Whether two fingerprints can be those of the same weights, up to rounding to bfloat16 and back.

    That moves the eight components by 3e-3 together, whatever the size of the layer, and hardly ever by 7.5e-3;
    training that moves one layer's `A` or `B` by 1 % moves them by 1.3e-2, about.
    """
    if not len(one) == len(two) > 0:
        return False
    return abs(one[0] - two[0]) <= 1e-3 * max(one[0], two[0]) and math.dist(one[1:], two[1:]) <= 7.5e-3


def _components(matrix: Tensor) -> list[float]:
    flat = matrix.detach().cpu().float().flatten()
    return (_directions(len(flat)) @ flat / flat.norm().clamp(min=1e-30)).tolist()


@functools.lru_cache(maxsize=8)  # the layers of a model have few sizes
def _directions(length: int) -> Tensor:
    index = torch.arange(1, length + 1, dtype=torch.float64)
    return torch.stack([torch.cos(frequency * index) for frequency in (1, 2, 3, 4)]).float()


def check_covariance(covariance: Covariance, where: str) -> None:
    """Raise `StatisticsError` naming `where` if the numbers are no covariance."""
    try:
        covariance.check()
    except InvalidCovarianceError as error:
        raise StatisticsError(f"{where} is not a covariance: {error}.") from None


def _read_tasks(file: TensorFile) -> Iterator[TaskStatistics]:
    version, header = _read_header(file)
    try:
        for t, task in enumerate(header):
            yield _read_task(file, t, task)
    except StatisticsError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise StatisticsError(f"{file.path} is not a statistics file of format {version}: {error!r}.") from None


def _read_header(file: TensorFile) -> tuple[int, list[dict[str, Any]]]:
    try:
        content = json.loads(file.metadata["peft_many"])
        version, tasks = content["version"], content["tasks"]
    except (KeyError, RecursionError, TypeError, ValueError):
        raise StatisticsError(
            f"{file.path} is not a statistics file of peft_many (its header does not say so)."
        ) from None
    if version not in READABLE_VERSIONS:
        raise StatisticsError(
            f"{file.path} has statistics format {version}, and this peft_many reads format {FORMAT_VERSION}. "
            "Please upgrade peft_many, or collect the statistics again."
        )
    return version, tasks


def _read_task(file: TensorFile, t: int, task: dict[str, Any]) -> TaskStatistics:
    path, read = file.path, _reader(file)
    covariances: dict[str, Covariance] = {}
    for g, group in enumerate(task["covariances"]):
        covariances |= dict.fromkeys(_names(group["modules"]), _read_covariance(file, f"{t}.covariance.{g}", group))
    spreads = {
        name: _read_covariance(file, f"{t}.spread.{name}", about) for name, about in task.get("spreads", {}).items()
    }
    prototypes = {name: read(f"{t}.prototype.{name}", 1) for name in _names(task["projectors"])}
    for name, spread in spreads.items():
        if name in prototypes and spread.width != len(prototypes[name]):
            raise StatisticsError(
                f"{path}: the spread of the images at '{name}' has width {spread.width}, and their prototype "
                f"{len(prototypes[name])}."
            )
        check_covariance(spread, f"{path}: the spread of the images at '{name}'")
    for name, prototype in prototypes.items():
        if not torch.isfinite(prototype).all():
            raise StatisticsError(f"{path}: tensor '{t}.prototype.{name}' holds NaN or Inf.")
    weight = float(task["weight"])
    if not 0 <= weight < math.inf:
        raise StatisticsError(f"{path}: a task's weight is {weight}; weights must be finite and not negative.")
    return TaskStatistics(
        name=task["name"],
        weight=weight,
        samples=int(task["samples"]),
        images=int(task["images"]),
        covariances=covariances,
        prototypes=prototypes,
        spreads=spreads,
        fingerprints={name: [float(value) for value in print_] for name, print_ in task["fingerprints"].items()},
        shapes={name: (int(out), int(width)) for name, (out, width) in task.get("shapes", {}).items()},
        deltas={name: read(f"{t}.lora_A.{name}", 2) for name in _names(task["deltas"])},
        lora_B={name: read(f"{t}.lora_B.{name}", 2) for name in _names(task.get("lora_B", []))},
    )


def _names(names: Any) -> list[str]:
    """Names of modules, and nothing else that JSON could hold in their place."""
    strange = [name for name in names if not isinstance(name, str)]
    if strange:
        raise TypeError(f"a module is called {strange[0]!r:.40}")
    return list(names)


def _read_covariance(file: TensorFile, key: str, about: Mapping[str, Any]) -> Covariance:
    read, tokens, remainder = _reader(file), int(about["tokens"]), float(about["remainder"])
    if f"{key}.matrix" in file:
        return DenseCovariance(remainder, tokens, read(f"{key}.matrix", 2))
    scale = float(about.get("scale", 1.0))
    if f"{key}.row_scales" not in file:
        return LowRankCovariance(remainder, tokens, read(f"{key}.factor", 2), scale)
    numbers, columns = read(f"{key}.factor", 2, torch.int8), read(f"{key}.column_exponents", 1, torch.int8)
    return LowRankCovariance(remainder, tokens, numbers, scale, Scales(read(f"{key}.row_scales", 1), columns))


def _reader(file: TensorFile) -> Callable[..., Tensor]:
    def read(key: str, dimensions: int, dtype: torch.dtype | None = None) -> Tensor:
        if key not in file:
            raise StatisticsError(f"{file.path} lacks the tensor '{key}'.")
        tensor = file[key]
        if dtype is not None and tensor.dtype != dtype:
            raise StatisticsError(f"{file.path}: tensor '{key}' has dtype {tensor.dtype}, not {dtype}.")
        if dtype is None and not tensor.is_floating_point():
            raise StatisticsError(f"{file.path}: tensor '{key}' has dtype {tensor.dtype}, not a floating-point one.")
        if tensor.dim() != dimensions:
            raise StatisticsError(
                f"{file.path}: tensor '{key}' has shape {tuple(tensor.shape)}, not {dimensions} dimensions."
            )
        return tensor

    return read
