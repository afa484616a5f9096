"""Reading adapters for a merge: every tensor of a folder is understood and checked, or the adapter is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from ..records import MergeRecord, Operation, Origin, PoolRecord, merge_of
from ..records.words import counted
from .base_tensors import split_base_tensors
from .card import data_sets_of
from .errors import UnmergeableAdapterError
from .hashes import sha256_of_each
from .lora_pairs import lora_pairs
from .mergeable import check_mergeable, layers_in_file
from .peft_deltas import deltas_by_peft
from .peft_methods import check_method, has_no_layers, is_plain_lora, name_of
from .projectors import projectors_in_merge, projectors_of_adapter
from .source import AdapterSource, open_weights, read_config
from .statistics import STATISTICS_NAME, AdapterStatistics, TaskStatistics, open_statistics
from .stored_delta import StoredDelta, StoredPair, check_whole, delta_of_adapter, deltas_in_merge
from .tensor_file import TensorFile
from .tensor_keys import KEY_PREFIX, TensorKeys, tensor_keys
from .untrusted import NONSENSE_ERRORS

_OTHER_FILE = f"{STATISTICS_NAME} is another adapter's; save or download the adapter again"
# Of the options that a task's adapter was trained with, those that a merge's config keeps.
_TOLD_OPTIONS = ("r", "lora_alpha", "use_rslora")


@dataclass(frozen=True)
class TaskAdapter:
    """One task as it goes into a merge. Weights and covariances stay on disk until they are used."""

    name: str
    weight: float  # w_t
    origin: Origin
    statistics: TaskStatistics
    deltas: Mapping[str, StoredDelta]  # by layer
    projectors: Mapping[str, Mapping[str, Tensor]]  # the state dict of each projector of its own
    base_tensors: Mapping[str, Tensor]  # those of the base model that lie beside the adapter
    source: str  # the adapter's name for messages


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, opened and checked: its config, its tasks (several if it is a merge) and its mapped files."""

    config: PeftConfig
    tasks: tuple[TaskAdapter, ...]
    files: tuple[TensorFile, ...]  # what everything is mapped from, the weights' first
    pairs: Mapping[str, StoredPair]  # by layer, the plain LoRA in the file, in a merge the merged one

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
    def averaged_projectors(self) -> dict[str, list[str]]:
        """In a merge, the projectors that are means, with the tasks in each."""
        return self.merge.averaged_projectors if self.merge is not None else {}


def read_adapter(source: AdapterSource) -> Adapter:
    """Read an adapter with its statistics, if it has any, or raise `UnmergeableAdapterError` or `StatisticsError`.

    Only safetensors and JSON are read, nothing is executed. Of an adapter without a statistics file nothing is known;
    whether that will do is for the caller to say.
    """
    return with_hashes([read_without_hash(source)])[0]


def read_without_hash(
    source: AdapterSource, task_names: str | Sequence[str] | None = None, base: nn.Module | None = None
) -> Adapter:
    """As [`read_adapter`], but for the hash of the weights in its origin, for which the whole file has to be read.

    `task_names` replaces the names of its tasks. The deltas of some PEFT methods depend on the base model.
    """
    try:
        return _read(source, task_names, base)
    except NONSENSE_ERRORS as error:
        # Configs and headers are JSON that anybody may have written; what is in them may have any type.
        raise _malformed(source, error) from error


def with_hashes(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adapters with the hashes of their weights in their origins. The tasks of merges have theirs already."""
    files = [adapter.files[0].path for adapter in adapters if adapter.merge is None]
    hashes = iter(sha256_of_each(files))
    return [adapter if adapter.merge is not None else _with_hash(adapter, next(hashes)) for adapter in adapters]


def _with_hash(adapter: Adapter, sha256: str) -> Adapter:
    tasks = [
        dataclasses.replace(task, origin=dataclasses.replace(task.origin, sha256=sha256)) for task in adapter.tasks
    ]
    return dataclasses.replace(adapter, tasks=tuple(tasks))


def check_can_be_merged(source: AdapterSource) -> None:
    """Raise `UnmergeableAdapterError` if an adapter's config or the names of its tensors say that it cannot be merged.

    Nothing is said of one without safetensors: PEFT can load that, and what it trains can be looked at on the model.
    """
    if not (source.folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return
    try:
        _opened(source)
    except NONSENSE_ERRORS as error:
        raise _malformed(source, error) from error


def _malformed(source: AdapterSource, error: Exception) -> UnmergeableAdapterError:
    return UnmergeableAdapterError(
        f"{source.name}: its config or the headers of its tensors hold nonsense ({error!r}); save or download the "
        "adapter again."
    )


def _opened(source: AdapterSource) -> tuple[PeftConfig, TensorFile, TensorKeys]:
    """The config, tensors and keys of an adapter that can be merged by what these say."""
    config, weights = read_config(source), open_weights(source)
    check_method(config, source.name)  # others may have no tensors by layer
    keys = tensor_keys(config, weights)
    check_mergeable(source.name, config, layers_in_file(weights, keys))
    return config, weights, keys


def _read(source: AdapterSource, task_names: str | Sequence[str] | None, base: nn.Module | None) -> Adapter:
    config, weights, keys = _opened(source)
    files, statistics = _read_statistics(source, config)
    pairs: dict[str, StoredPair] = {}
    if isinstance(config, LoraConfig) and is_plain_lora(config):
        pairs = lora_pairs(source.name, config, weights, keys)
    for key in keys.rest:
        check_whole(weights, key)
    rest = {key.removeprefix(KEY_PREFIX): weights[key] for key in keys.rest}
    base_tensors, rest = split_base_tensors(source.name, config, rest)
    merge = merge_of(config)
    if merge is not None:
        tasks = _tasks_of_merge(source, merge, statistics, pairs, rest, base_tensors)
    elif len(statistics.tasks) != 1:
        raise UnmergeableAdapterError(
            f"{source.name} is no merge, but its statistics hold {len(statistics.tasks)} tasks: {_OTHER_FILE}."
        )
    else:
        measured = statistics.tasks[0]
        deltas = (
            {name: delta_of_adapter(pair, measured, source.name) for name, pair in pairs.items()}
            if pairs
            else deltas_by_peft(source.name, config, weights, keys, measured, base)
        )
        tasks = (_single_task(source, config, measured, deltas, rest, base_tensors),)
    if task_names is not None:
        names = [task_names] if isinstance(task_names, str) else list(task_names)
        if len(names) != len(tasks):
            raise ValueError(
                f"`task_names` gives {names} for {source.name}, which holds {counted(len(tasks), 'task')}: give one "
                "name for each."
            )
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
    if has_no_layers(config):
        raise UnmergeableAdapterError(
            f"{source.name} is a routed model (`export_routed_model`), with its LoRAs in the model's weights: merge "
            "what it was exported from."
        )
    if merge_of(config) is not None:
        raise UnmergeableAdapterError(
            f"{source.name} is a merge and has no statistics: its {STATISTICS_NAME}, which holds its tasks' deltas, "
            "is missing. Merge the tasks' own adapters, or get the file from where the merge comes from."
        )
    return [], AdapterStatistics((TaskStatistics(name=None, samples=0),))


def _single_task(
    source: AdapterSource,
    config: PeftConfig,
    measured: TaskStatistics,
    deltas: Mapping[str, StoredDelta],
    rest: Mapping[str, Tensor],
    base_tensors: Mapping[str, Tensor],
) -> TaskAdapter:
    return TaskAdapter(
        name=getattr(config, "task_name", None) or measured.name or source.short_name,
        weight=measured.weight,  # 1 but of pooled tasks
        origin=_origin(source, config),
        statistics=measured,
        deltas=deltas,
        projectors=projectors_of_adapter(source.name, config, measured, rest),
        base_tensors=base_tensors,
        source=source.name,
    )


def _origin(source: AdapterSource, config: PeftConfig) -> Origin:
    """What a merge's record says of where a task came from."""
    options = {name: value for name in _TOLD_OPTIONS if (value := getattr(config, name, None)) not in (None, False)}
    pool: PoolRecord | None = getattr(config, "pool", None)
    return Origin(
        sha256="",  # see `with_hashes`
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
    base_tensors: Mapping[str, Tensor],
) -> tuple[TaskAdapter, ...]:
    """Take a merge apart."""
    if len(merge.tasks) != len(statistics.tasks):
        raise UnmergeableAdapterError(
            f"{source.name}: its config names {len(merge.tasks)} tasks, but its statistics hold "
            f"{len(statistics.tasks)}: {_OTHER_FILE}."
        )
    for about, measured in zip(merge.tasks, statistics.tasks):
        if measured.name != about.name:
            raise UnmergeableAdapterError(
                f"{source.name}, task '{about.name}': its statistics are those of '{measured.name}': {_OTHER_FILE}."
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
            base_tensors={name: base_tensors[name] for name in about.origin.base_tensors if name in base_tensors},
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
                f"{delta.shape[1]}: {_OTHER_FILE}."
            )
