"""What was measured of an adapter's tasks, and its file: `adapter_statistics.safetensors` beside the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..algebra.covariance import Covariance, DenseCovariance, InvalidCovarianceError, LowRankCovariance, truncate
from .atomic import replace_file

STATISTICS_NAME = "adapter_statistics.safetensors"
FORMAT_VERSION = 1
DEFAULT_ENERGY = 0.999


class StatisticsError(ValueError):
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
        fingerprints (`Mapping[str, Sequence[float]]`):
            By layer, the `weight_fingerprint` of the adapter's weights when the task was measured (or merged): a later
            training run makes the statistics stale, and this tells.
        weight (`float`): `w_t`; other than 1 only inside a merge.
        deltas (`Mapping[str, torch.Tensor]`):
            Inside a merge, each trained layer's `A_t` with the LoRA scaling folded in, shape `(r_t, in)`.
    """

    name: str | None
    samples: int
    images: int
    covariances: Mapping[str, Covariance]
    prototypes: Mapping[str, Tensor]
    fingerprints: Mapping[str, Sequence[float]] = field(default_factory=dict)
    weight: float = 1.0
    deltas: Mapping[str, Tensor] = field(default_factory=dict)

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

    def save(self, folder: str | os.PathLike[str], energy: float = DEFAULT_ENERGY) -> None:
        """Write the file into `folder`, whole or not at all.

        Covariances that were collected whole are truncated to `energy` (MAny*, float32 factors); with `energy=1.0`
        they are kept whole in float64. Those that were truncated before are written as they are.
        """
        tensors: dict[str, Tensor] = {}
        header: list[dict[str, Any]] = []
        for t, task in enumerate(self.tasks):
            groups = []
            for g, (covariance, modules) in enumerate(task.groups()):
                if isinstance(covariance, DenseCovariance) and energy < 1.0:
                    covariance = truncate(covariance, energy)
                key = f"{t}.covariance.{g}"
                if isinstance(covariance, DenseCovariance):
                    tensors[f"{key}.matrix"] = covariance.matrix
                elif isinstance(covariance, LowRankCovariance):
                    tensors[f"{key}.factor"] = covariance.factor
                groups.append({"modules": modules, "tokens": covariance.tokens, "remainder": covariance.remainder})
            tensors |= {f"{t}.prototype.{name}": prototype for name, prototype in task.prototypes.items()}
            tensors |= {f"{t}.lora_A.{name}": rows for name, rows in task.deltas.items()}
            header.append(
                {
                    "name": task.name,
                    "weight": task.weight,
                    "samples": task.samples,
                    "images": task.images,
                    "covariances": groups,
                    "projectors": list(task.prototypes),
                    "deltas": list(task.deltas),
                    "fingerprints": {name: list(values) for name, values in task.fingerprints.items()},
                }
            )
        # One entry only: safetensors writes several in an order that changes from file to file.
        metadata = {"peft_many": json.dumps({"version": FORMAT_VERSION, "tasks": header})}
        with replace_file(Path(folder) / STATISTICS_NAME) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AdapterStatistics:
        """Read a statistics file. Tensors stay on disk, memory-mapped, until they are used.

        Raises:
            StatisticsError: The file is damaged, of another format, or lacks a tensor.
        """
        return cls(tuple(_read_tasks(Path(path))))


def weight_fingerprint(A: Tensor, B: Tensor) -> list[float]:
    """Nine numbers that move with any change of a LoRA's weights, and hardly with a cast to another dtype.

    The norm of `B`, and the components of `A` and `B`, each of norm one, along four fixed directions: a norm alone
    moves in second order only. A factor on `A`, such as the LoRA scaling, changes nothing.
    """
    return [B.double().norm().item(), *_components(A), *_components(B)]


def same_weights(one: Sequence[float], two: Sequence[float]) -> bool:
    """Whether two fingerprints can be those of the same weights, up to rounding to bfloat16 and back."""
    close = abs(one[0] - two[0]) <= 1e-3 * max(one[0], two[0])
    return close and len(one) == len(two) and all(abs(a - b) <= 4e-3 for a, b in zip(one[1:], two[1:]))


def _components(matrix: Tensor) -> list[float]:
    flat = matrix.detach().cpu().double().flatten()
    index = torch.arange(1, len(flat) + 1, dtype=torch.float64)
    directions = torch.stack([torch.cos(frequency * index) for frequency in (1, 2, 3, 4)])
    return (directions @ flat / flat.norm().clamp(min=1e-300)).tolist()


def check_covariance(covariance: Covariance, where: str) -> None:
    """Raise `StatisticsError` naming `where` if the numbers are no covariance."""
    try:
        covariance.check()
    except InvalidCovarianceError as error:
        raise StatisticsError(f"{where} is not a covariance: {error}.") from None


def _read_tasks(path: Path) -> Iterator[TaskStatistics]:
    try:
        with safe_open(path, framework="pt") as file:
            version, header = _read_header(path, file.metadata())
            for t, task in enumerate(header):
                yield _read_task(path, file, t, task)
    except FileNotFoundError:
        raise StatisticsError(f"{path} does not exist.") from None
    except SafetensorError as error:
        raise StatisticsError(f"{path} is damaged or truncated ({error}).") from None
    except StatisticsError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StatisticsError(f"{path} is not a statistics file of format {version}: {error!r}.") from None


def _read_header(path: Path, metadata: dict[str, str] | None) -> tuple[int, list[dict[str, Any]]]:
    try:
        content = json.loads((metadata or {})["peft_many"])
        version, tasks = content["version"], content["tasks"]
    except (KeyError, TypeError, ValueError):
        raise StatisticsError(f"{path} is not a statistics file of peft_many (its header does not say so).") from None
    if version != FORMAT_VERSION:
        raise StatisticsError(
            f"{path} has statistics format {version}, and this peft_many reads format {FORMAT_VERSION}. "
            "Please upgrade peft_many, or collect the statistics again."
        )
    return version, tasks


def _read_task(path: Path, file: Any, t: int, task: dict[str, Any]) -> TaskStatistics:
    keys = set(file.keys())

    def read(key: str, dimensions: int) -> Tensor:
        if key not in keys:
            raise StatisticsError(f"{path} lacks the tensor '{key}'.")
        tensor: Tensor = file.get_tensor(key)
        if not tensor.is_floating_point():
            raise StatisticsError(f"{path}: tensor '{key}' has dtype {tensor.dtype}, not a floating-point one.")
        if tensor.dim() != dimensions:
            raise StatisticsError(
                f"{path}: tensor '{key}' has shape {tuple(tensor.shape)}, not {dimensions} dimensions."
            )
        return tensor

    covariances: dict[str, Covariance] = {}
    for g, group in enumerate(task["covariances"]):
        key, about = f"{t}.covariance.{g}", {"tokens": int(group["tokens"]), "remainder": float(group["remainder"])}
        covariance: Covariance
        if f"{key}.matrix" in keys:
            covariance = DenseCovariance(matrix=read(f"{key}.matrix", 2), **about)  # type: ignore[arg-type]
        else:
            covariance = LowRankCovariance(factor=read(f"{key}.factor", 2), **about)  # type: ignore[arg-type]
        covariances |= dict.fromkeys(group["modules"], covariance)
    prototypes = {name: read(f"{t}.prototype.{name}", 1) for name in task["projectors"]}
    for name, prototype in prototypes.items():
        if not torch.isfinite(prototype).all():
            raise StatisticsError(f"{path}: tensor '{t}.prototype.{name}' holds NaN or Inf.")
    return TaskStatistics(
        name=task["name"],
        weight=float(task["weight"]),
        samples=int(task["samples"]),
        images=int(task["images"]),
        covariances=covariances,
        prototypes=prototypes,
        fingerprints={name: [float(value) for value in print_] for name, print_ in task["fingerprints"].items()},
        deltas={name: read(f"{t}.lora_A.{name}", 2) for name in task["deltas"]},
    )
