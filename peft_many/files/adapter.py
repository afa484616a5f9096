"""Reading adapters for a merge: every tensor of a folder is understood and checked, or the adapter is refused."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor, nn

from ..records import MergeRecord, Operation, Origin, PoolRecord, merge_of
from .card import data_sets_of
from .lora_pairs import split_pairs
from .peft_deltas import deltas_by_peft
from .peft_methods import check_method, check_options, is_plain_lora, name_of
from .projectors import projectors_in_merge, projectors_of_adapter
from .source import AdapterSource
from .statistics import STATISTICS_NAME, AdapterStatistics, StatisticsError, TaskStatistics, open_statistics
from .stored_delta import (
    KEY_PREFIX,
    StoredDelta,
    StoredPair,
    UnmergeableAdapterError,
    delta_of_adapter,
    deltas_in_merge,
)
from .tensor_file import TensorFile
from .untrusted import LARGEST_CONFIG, NONSENSE_ERRORS, check_config

# Of the options that a task's adapter was trained with, those that a merge's config keeps.
_TOLD_OPTIONS = ("r", "lora_alpha", "use_rslora")


@dataclass(frozen=True)
class TaskAdapter:
    """One task as it goes into a merge. Weights and covariances stay on disk until they are used.

    Args:
        name (`str`): The task's name.
        weight (`float`): `w_t`.
        origin ([`Origin`]): Where its adapter came from, for the merge's record.
        statistics ([`TaskStatistics`]): Covariances and prototypes.
        deltas (`Mapping[str, StoredDelta]`): By layer.
        projectors (`Mapping[str, Mapping[str, torch.Tensor]]`): The state dict of each projector of its own.
        source (`str`): The adapter's name for messages.
    """

    name: str
    weight: float
    origin: Origin
    statistics: TaskStatistics
    deltas: Mapping[str, StoredDelta]
    projectors: Mapping[str, Mapping[str, Tensor]]
    source: str


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, opened and checked: its config, its tasks (several if it is a merge) and its mapped files.

    Args:
        config ([`~peft.LoraConfig`]): As saved.
        tasks (`tuple[TaskAdapter, ...]`): One, or those of a merge.
        files (`tuple[TensorFile, ...]`): What everything is mapped from.
        pairs (`Mapping[str, StoredPair]`): By layer, the LoRA in the file, in a merge the merged one; none of others.
    """

    config: PeftConfig
    tasks: tuple[TaskAdapter, ...]
    files: tuple[TensorFile, ...]
    pairs: Mapping[str, StoredPair]

    @property
    def merge(self) -> MergeRecord | None:
        """What its config says of how it was made, if it is a merge."""
        return merge_of(self.config)

    @property
    def operations(self) -> list[Operation]:
        """What was done to make it."""
        record = self.merge or getattr(self.config, "pool", None)
        return record.operations if record is not None else []

    @property
    def is_gated(self) -> bool:
        """Whether it is a merge with `gate_lora`."""
        return self.merge is not None and bool(self.merge.options.gate_lora)

    @property
    def averaged_projectors(self) -> dict[str, list[str]]:
        """In a merge, the projectors that are means, with the tasks in each."""
        return self.merge.averaged_projectors if self.merge is not None else {}


def read_adapter(
    source: AdapterSource, task_names: str | Sequence[str] | None = None, base: nn.Module | None = None
) -> Adapter:
    """Read an adapter with its statistics, if it has any. Only safetensors and JSON are read, nothing is executed.

    Args:
        source ([`AdapterSource`]): Where it is.
        task_names (`str` or `Sequence[str]`, *optional*): Overrides the task's name; a list, for each task of a merge.
        base (`torch.nn.Module`, *optional*): The base model, which the deltas of some PEFT methods depend on.

    An adapter without a statistics file is read as one task of which nothing is known; whether the merge can do
    without is for the caller to say.

    Raises:
        UnmergeableAdapterError: It cannot be merged, be it damaged or not linear.
    """
    try:
        return _read(source, task_names, base)
    except (UnmergeableAdapterError, StatisticsError):
        raise
    except NONSENSE_ERRORS as error:
        # Configs and headers are JSON that anybody may have written; what is in them may have any type.
        raise UnmergeableAdapterError(f"{source.name} is malformed: {error!r}.") from error


def _read(source: AdapterSource, task_names: str | Sequence[str] | None, base: nn.Module | None) -> Adapter:
    config = _read_config(source)
    weights = _open_weights(source)
    layers = (key.removeprefix(KEY_PREFIX).partition(".lora_")[0] for key in sorted(weights) if ".lora_" in key)
    try:
        check_options(config, next(layers, "no layer"))
    except ValueError as error:
        raise UnmergeableAdapterError(f"{source.name} {error}") from None
    files, statistics = _read_statistics(source, config)
    pairs: dict[str, StoredPair] = {}
    merge = merge_of(config)
    if merge is not None:
        pairs, rest = split_pairs(source.name, config, weights)
        tasks = _tasks_of_merge(source, merge, statistics, pairs, rest)
    else:
        if len(statistics.tasks) != 1:
            raise UnmergeableAdapterError(
                f"{source.name} is no merge, but its statistics hold {len(statistics.tasks)} tasks."
            )
        measured = statistics.tasks[0]
        if isinstance(config, LoraConfig) and is_plain_lora(config):
            pairs, rest = split_pairs(source.name, config, weights)
            deltas = {name: delta_of_adapter(pair, measured, name, source.name) for name, pair in pairs.items()}
        else:
            deltas, rest = deltas_by_peft(source.name, config, weights, measured, base)
        tasks = (_single_task(source, config, measured, deltas, rest),)
    if task_names is not None:
        names = [task_names] if isinstance(task_names, str) else list(task_names)
        if len(names) != len(tasks):
            raise ValueError(f"`task_names` gives {names} for {source.name}, which holds {len(tasks)} tasks.")
        tasks = tuple(dataclasses.replace(task, name=name) for task, name in zip(tasks, names))
    for task in tasks:
        _check_statistics_fit(task)
    files = [weights, *files]
    for file in files:
        file.release()
    return Adapter(config, tasks, tuple(files), pairs)


def _read_statistics(source: AdapterSource, config: PeftConfig) -> tuple[list[TensorFile], AdapterStatistics]:
    """The statistics and the file that they are mapped from, if there is one."""
    path = source.folder / STATISTICS_NAME
    if path.is_file():
        file = open_statistics(path)
        return [file], AdapterStatistics.of(file)
    if merge_of(config) is not None:
        raise UnmergeableAdapterError(
            f"{source.name} is a merge and has no statistics: its {STATISTICS_NAME}, which holds its tasks' deltas, "
            "is missing. Merge the tasks' own adapters, or get the file from where the merge comes from."
        )
    return [], AdapterStatistics((TaskStatistics(name=None, samples=0),))


def _read_config(source: AdapterSource) -> PeftConfig:
    if not (source.folder / CONFIG_NAME).is_file():
        raise UnmergeableAdapterError(f"{source.name} has no {CONFIG_NAME}: it is no PEFT adapter.")
    if (source.folder / CONFIG_NAME).stat().st_size > LARGEST_CONFIG:
        raise UnmergeableAdapterError(f"{source.name}: {CONFIG_NAME} is larger than {LARGEST_CONFIG >> 20} MiB.")
    try:
        config = PeftConfig.from_pretrained(str(source.folder))
    except (StatisticsError, UnmergeableAdapterError):
        raise
    except (*NONSENSE_ERRORS, ValueError) as error:
        # ValueError covers broken JSON and the messages of configs, which are written for people.
        reason = f"{error} is unknown" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise UnmergeableAdapterError(f"{source.name}: {CONFIG_NAME} cannot be used: {reason}.") from error
    try:
        check_method(config)
    except ValueError as error:
        raise UnmergeableAdapterError(f"{source.name} {error}; it cannot be merged.") from None
    check_config(config, source.name)
    return config


def _open_weights(source: AdapterSource) -> TensorFile:
    path = source.folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        pickled = (source.folder / WEIGHTS_NAME).is_file()
        raise UnmergeableAdapterError(
            f"{source.name} has no {SAFETENSORS_WEIGHTS_NAME}"
            + (
                f"; its {WEIGHTS_NAME} is a pickle, which is never opened. Save it again as safetensors."
                if pickled
                else "."
            )
        )
    try:
        return TensorFile(path)
    except SafetensorError as error:
        raise UnmergeableAdapterError(f"{path} is damaged or truncated ({error}).") from None


def _single_task(
    source: AdapterSource,
    config: PeftConfig,
    measured: TaskStatistics,
    deltas: Mapping[str, StoredDelta],
    rest: Mapping[str, Tensor],
) -> TaskAdapter:
    return TaskAdapter(
        name=getattr(config, "task_name", None) or measured.name or source.short_name,
        weight=measured.weight,  # 1 but of pooled tasks
        origin=_origin(source, config),
        statistics=measured,
        deltas=deltas,
        projectors=projectors_of_adapter(source.name, config, measured, rest),
        source=source.name,
    )


def _origin(source: AdapterSource, config: PeftConfig) -> Origin:
    """What a merge's record says of where a task came from."""
    options = {name: value for name in _TOLD_OPTIONS if (value := getattr(config, name, None)) not in (None, False)}
    pool: PoolRecord | None = getattr(config, "pool", None)
    return Origin(
        sha256=_sha256(source.folder),
        source=source.public_name,
        revision=source.revision,
        options={"peft_type": name_of(config), **options},
        datasets=data_sets_of(source.folder),
        pooled=pool.tasks if pool is not None else [],
    )


def _tasks_of_merge(
    source: AdapterSource,
    merge: MergeRecord,
    statistics: AdapterStatistics,
    pairs: Mapping[str, StoredPair],
    rest: Mapping[str, Tensor],
) -> tuple[TaskAdapter, ...]:
    """Take a merge apart."""
    if len(merge.tasks) != len(statistics.tasks):
        raise UnmergeableAdapterError(
            f"{source.name} names {len(merge.tasks)} tasks, but its statistics hold {len(statistics.tasks)}."
        )
    for about, measured in zip(merge.tasks, statistics.tasks):
        if measured.name != about.name:
            raise UnmergeableAdapterError(
                f"{source.name}, task '{about.name}': its statistics are those of '{measured.name}'."
            )
    parts = zip(merge.tasks, statistics.tasks, deltas_in_merge(source.name, pairs, statistics))
    return tuple(
        TaskAdapter(
            name=about.name,
            weight=float(about.weight),
            origin=about.origin,
            statistics=measured,
            deltas=deltas,
            projectors=projectors_in_merge(source.name, merge, measured, about.name, rest),
            source=f"{source.name}, task '{about.name}'",
        )
        for about, measured, deltas in parts
    )


def _check_statistics_fit(task: TaskAdapter) -> None:
    """The covariances must be those of the layers that were trained."""
    for module, delta in task.deltas.items():
        covariance = task.statistics.covariance_of(module)
        if covariance is not None and covariance.width != delta.shape[1]:
            raise UnmergeableAdapterError(
                f"{task.source}: the covariance of '{module}' has width {covariance.width}, but its LoRA has "
                f"{delta.shape[1]}."
            )


def _sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    with open(folder / SAFETENSORS_WEIGHTS_NAME, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
