"""Reading adapters for a merge: every tensor of a folder is understood and checked, or the adapter is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
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
from .source import AdapterSource
from .statistics import (
    STATISTICS_NAME,
    AdapterStatistics,
    StatisticsError,
    TaskStatistics,
    open_statistics,
)
from .stored_delta import (
    KEY_PREFIX,
    StoredDelta,
    StoredPair,
    UnmergeableAdapterError,
    delta_in_merge,
    delta_of_adapter,
)
from .tensor_file import TensorFile
from .untrusted import LARGEST_CONFIG, NONSENSE_ERRORS, check_config


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
        measured = _of_one_task(source, statistics)
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
    return [], AdapterStatistics((TaskStatistics(name=None, samples=0, images=0, covariances={}, prototypes={}),))


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


def _of_one_task(source: AdapterSource, statistics: AdapterStatistics) -> TaskStatistics:
    if len(statistics.tasks) != 1:
        raise UnmergeableAdapterError(
            f"{source.name} is no merge, but its statistics hold {len(statistics.tasks)} tasks."
        )
    return statistics.tasks[0]


def _single_task(
    source: AdapterSource,
    config: PeftConfig,
    measured: TaskStatistics,
    deltas: Mapping[str, StoredDelta],
    rest: dict[str, Tensor],
) -> TaskAdapter:
    projectors: dict[str, dict[str, Tensor]] = {}
    # A plain LoRA adapter does not say which of its modules is a projector; measuring it found out.
    known = getattr(config, "projector_modules", None) or list(measured.prototypes)
    if not known and not measured.is_measured:
        known = _named_like_projectors(rest)
    for key, tensor in rest.items():
        projector = next((name for name in known if key.startswith(f"{name}.")), None)
        if projector is None:
            raise UnmergeableAdapterError(
                f"{source.name}: tensor '{key}' belongs to a module that is trained whole and is no projector; "
                "such modules cannot be merged."
                + ("" if known else " (If it is one: no image passed while its statistics were collected.)")
            )
        if not _is_saved_whole(projector, config):
            raise UnmergeableAdapterError(
                f"{source.name}: tensor '{key}' is a part of the projector '{projector}'; only projectors that "
                f"are trained whole can be merged (`modules_to_save=['{projector.rpartition('.')[2]}']`)."
            )
        projectors.setdefault(projector, {})[key.removeprefix(f"{projector}.")] = tensor
    lost = next((name for name in known if name not in projectors and _is_saved_whole(name, config)), None)
    if lost is not None:
        raise UnmergeableAdapterError(
            f"{source.name} trained the projector '{lost}', but its {SAFETENSORS_WEIGHTS_NAME} has no tensor of it: "
            "the file is incomplete; save or download the adapter again."
        )
    return TaskAdapter(
        name=getattr(config, "task_name", None) or measured.name or source.short_name,
        weight=measured.weight,  # 1 but of pooled tasks
        origin=_origin(source, config),
        statistics=measured,
        deltas=deltas,
        projectors=projectors,
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


# Of the options that a task's adapter was trained with, those that a merge's config keeps.
_TOLD_OPTIONS = ("r", "lora_alpha", "use_rslora", "energy")


# The last path component of a projector, by the names that transformers' families use: there is no model to look at.
PROJECTOR_NAME = re.compile(
    r"multi_modal_projector|mm_projector|projector|connector|merger|deepstack_merger_list|aligner|"
    r"language_projection|vision_projection"
)


def _named_like_projectors(rest: Iterable[str]) -> list[str]:
    """The modules of these tensors that transformers' families call so that they are projectors."""
    parents = {key.rsplit(".", levels)[0]: None for key in rest for levels in range(key.count("."), 0, -1)}
    found: list[str] = []
    for path in parents:
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if PROJECTOR_NAME.fullmatch(path.rpartition(".")[2]) and not inside:
            found.append(path)
    return found


def _is_saved_whole(module: str, config: PeftConfig) -> bool:
    """Whether `modules_to_save` names the module or one around it; PEFT compares the ends of paths."""
    around = [module.rsplit(".", levels)[0] for levels in range(module.count(".") + 1)]
    return any(path.endswith(name) for path in around for name in getattr(config, "modules_to_save", None) or [])


def _tasks_of_merge(
    source: AdapterSource,
    merge: MergeRecord,
    statistics: AdapterStatistics,
    pairs: dict[str, StoredPair],
    rest: dict[str, Tensor],
) -> tuple[TaskAdapter, ...]:
    """Take a merge apart: the statistics hold every `A_t`; the `B_t` are columns of the merged `B`, or there too."""
    if len(merge.tasks) != len(statistics.tasks):
        raise UnmergeableAdapterError(
            f"{source.name} names {len(merge.tasks)} tasks, but its statistics hold {len(statistics.tasks)}."
        )
    columns = dict.fromkeys(pairs, 0)
    unstacked = {module for task in statistics.tasks for module in task.lora_B if module in task.deltas}
    tasks = []
    for about, measured in zip(merge.tasks, statistics.tasks):
        name = f"{source.name}, task '{about.name}'"
        if measured.name != about.name:
            raise UnmergeableAdapterError(f"{name}: its statistics are those of '{measured.name}'.")
        deltas = {}
        for module, A in measured.deltas.items():
            disagreement = f"{source.name}: its weights and its statistics disagree on '{module}'."
            if module not in pairs or A.shape[1] != pairs[module].shape("A")[1]:
                raise UnmergeableAdapterError(disagreement)
            start, own = columns[module], measured.lora_B.get(module)
            if (module in unstacked) != (own is not None):
                raise UnmergeableAdapterError(disagreement)
            if own is not None and tuple(own.shape) != (pairs[module].shape("B")[0], A.shape[0]):
                raise UnmergeableAdapterError(disagreement)
            end = columns[module] = start + A.shape[0] if own is None else pairs[module].shape("A")[0]
            block = None if own is not None else slice(start, end)
            deltas[module] = delta_in_merge(pairs[module], measured, module, block, name)
        projectors: dict[str, dict[str, Tensor]] = {}
        for projector, routed in merge.routing.items():
            order = routed.names
            if about.name in order and len(measured.prototypes.get(projector, ())) != routed.width:
                raise UnmergeableAdapterError(f"{name}: its statistics lack its prototype at '{projector}'.")
            prefix = f"{projector}.experts.task_{order.index(about.name)}." if about.name in order else None
            expert = {k.removeprefix(prefix): v for k, v in rest.items() if prefix and k.startswith(prefix)}
            projectors |= {projector: expert} if expert else {}
        for projector, averaged in merge.averaged_projectors.items():
            if about.name in averaged:  # the mean of these tasks' projectors stands for each of them
                prefix = f"{projector}."
                mean = {k.removeprefix(prefix): v for k, v in rest.items() if k.startswith(prefix)}
                if not mean:
                    raise UnmergeableAdapterError(f"{source.name} lacks the tensors of its projector '{projector}'.")
                projectors[projector] = mean
        tasks.append(
            TaskAdapter(
                name=about.name,
                weight=float(about.weight),
                origin=about.origin,
                statistics=measured,
                deltas=deltas,
                projectors=projectors,
                source=name,
            )
        )
    wrong = next((module for module, pair in pairs.items() if columns[module] != pair.shape("A")[0]), None)
    if wrong is not None:
        raise UnmergeableAdapterError(f"{source.name}: its weights and its statistics disagree on '{wrong}'.")
    return tuple(tasks)


def _check_statistics_fit(task: TaskAdapter) -> None:
    """The covariances must be those of the layers that were trained."""
    for module, delta in task.deltas.items():
        covariance = task.statistics.covariances.get(module)
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
