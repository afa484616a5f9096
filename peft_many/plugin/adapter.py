"""Reading adapters for a merge: every tensor of a folder is understood and checked, or the adapter is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor

from .config import MAnyConfig
from .families import PROJECTOR_NAME
from .hub import AdapterSource
from .patterns import MODULE_NAME, ByPattern, check_patterns
from .statistics import (
    STATISTICS_NAME,
    AdapterStatistics,
    StatisticsError,
    TaskStatistics,
    open_statistics,
)
from .stored_delta import (
    KEY_PREFIX,
    TASK_WEIGHT,
    StoredDelta,
    StoredPair,
    UnmergeableAdapterError,
    check_finite,
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
        provenance (`dict`): Source, revision and hash, for the merge's config.
        statistics ([`TaskStatistics`]): Covariances and prototypes.
        deltas (`Mapping[str, StoredDelta]`): By layer.
        projectors (`Mapping[str, Mapping[str, torch.Tensor]]`): The state dict of each projector of its own.
        source (`str`): The adapter's name for messages.
    """

    name: str
    weight: float
    provenance: dict[str, Any]
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
        pairs (`Mapping[str, StoredPair]`): The adapter's own LoRA by layer, in a merge the merged one.
    """

    config: LoraConfig
    tasks: tuple[TaskAdapter, ...]
    files: tuple[TensorFile, ...]
    pairs: Mapping[str, StoredPair]


def read_adapter(source: AdapterSource, task_names: str | Sequence[str] | None = None) -> Adapter:
    """Read an adapter with its statistics, if it has any. Only safetensors and JSON are read, nothing is executed.

    Args:
        source ([`AdapterSource`]): Where it is.
        task_names (`str` or `Sequence[str]`, *optional*): Overrides the task's name; a list, for each task of a merge.

    An adapter without a statistics file is read as one task of which nothing is known; whether the merge can do
    without is for the caller to say.

    Raises:
        UnmergeableAdapterError: It cannot be merged, be it damaged or not linear.
    """
    try:
        return _read(source, task_names)
    except (UnmergeableAdapterError, StatisticsError):
        raise
    except NONSENSE_ERRORS as error:
        # Configs and headers are JSON that anybody may have written; what is in them may have any type.
        raise UnmergeableAdapterError(f"{source.name} is malformed: {error!r}.") from error


def _read(source: AdapterSource, task_names: str | Sequence[str] | None) -> Adapter:
    config = _read_config(source)
    weights = _open_weights(source)
    _check_additive(source, config, weights)
    measured, statistics = _read_statistics(source, config)
    pairs, rest = _split_pairs(source, config, weights)
    if isinstance(config, MAnyConfig) and config.is_merge:
        tasks = _tasks_of_merge(source, config, statistics, pairs, rest)
    else:
        tasks = (_single_task(source, config, statistics, pairs, rest),)
    if task_names is not None:
        names = [task_names] if isinstance(task_names, str) else list(task_names)
        if len(names) != len(tasks):
            raise ValueError(f"`task_names` gives {names} for {source.name}, which holds {len(tasks)} tasks.")
        tasks = tuple(dataclasses.replace(task, name=name) for task, name in zip(tasks, names))
    for task in tasks:
        if not isinstance(task.name, str) or not isinstance(task.provenance["sha256"], str):
            raise UnmergeableAdapterError(f"{source.name} is malformed: its tasks lack a name or a hash.")
        _check_statistics_fit(task)
    files = (weights, *measured)
    for file in files:
        file.release()
    return Adapter(config, tasks, files, pairs)


def _read_statistics(source: AdapterSource, config: LoraConfig) -> tuple[list[TensorFile], AdapterStatistics]:
    """The statistics and the file that they are mapped from, if there is one."""
    path = source.folder / STATISTICS_NAME
    if path.is_file():
        file = open_statistics(path)
        return [file], AdapterStatistics.of(file)
    if isinstance(config, MAnyConfig) and config.is_merge:
        raise UnmergeableAdapterError(
            f"{source.name} is a merge and has no statistics: its {STATISTICS_NAME}, which holds its tasks' deltas, "
            "is missing. Merge the tasks' own adapters, or get the file from where the merge comes from."
        )
    return [], AdapterStatistics((TaskStatistics(name=None, samples=0, images=0, covariances={}, prototypes={}),))


def _read_config(source: AdapterSource) -> LoraConfig:
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
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in ("LORA", "MANY"):
        raise UnmergeableAdapterError(f"{source.name} is of PEFT type {kind}; only LORA and MANY can be merged.")
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


# LoRA options whose effect on a layer is not `scaling * B A`, or that change more than linear layers.
_UNSUPPORTED_OPTIONS = (
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "megatron_config",
    "use_qalora",
)
# Initialisations that change the base weights: `B A` is then no delta on the original model.
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def _check_additive(source: AdapterSource, config: LoraConfig, weights: TensorFile) -> None:
    """Refuse every kind of adapter whose effect is not an additive low-rank delta on linear layers."""
    layers = (key.removeprefix(KEY_PREFIX).partition(".lora_")[0] for key in sorted(weights) if ".lora_" in key)
    layer = next(layers, "no layer")
    variants = [f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")]
    for option in [*variants, *_UNSUPPORTED_OPTIONS]:
        if getattr(config, option, None):
            raise UnmergeableAdapterError(
                f"{source.name} uses `{option}`, so its effect on '{layer}' is no plain low-rank delta and cannot be "
                "merged."
            )
    if config.bias != "none":
        raise UnmergeableAdapterError(f"{source.name} trains biases (`bias='{config.bias}'`), which cannot be merged.")
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(_MUTATING_INITS):
        raise UnmergeableAdapterError(
            f"{source.name} was initialised with `init_lora_weights='{init}'`, which changes the base weights of "
            f"'{layer}'. Convert it with `path_initial_model_for_weight_conversion` of `save_pretrained` first."
        )


def _split_pairs(
    source: AdapterSource, config: LoraConfig, weights: TensorFile
) -> tuple[dict[str, StoredPair], dict[str, Tensor]]:
    """The LoRA pairs by layer, and all other tensors by key without PEFT's prefix."""
    halves: dict[str, set[str]] = {}
    rest: dict[str, Tensor] = {}
    for key in weights:
        if not key.startswith(KEY_PREFIX):
            raise UnmergeableAdapterError(f"{source.name}: tensor '{key}' does not begin with '{KEY_PREFIX}'.")
        name = key.removeprefix(KEY_PREFIX)
        if not MODULE_NAME.fullmatch(name):  # it will be part of patterns, tables and messages
            raise UnmergeableAdapterError(f"{source.name}: tensor {key!r:.200} is not called as modules are.")
        half = next((half for half in "AB" if name.endswith(f".lora_{half}.weight")), None)
        if half is not None:
            halves.setdefault(name.removesuffix(f".lora_{half}.weight"), set()).add(half)
        elif getattr(config, "gate_lora", False) and name.endswith(f".{TASK_WEIGHT}"):
            continue  # the statistics hold every `A_t`
        elif ".lora_" in name:
            raise UnmergeableAdapterError(
                f"{source.name}: tensor '{name}' is no plain LoRA weight of a linear layer and cannot be merged."
            )
        else:
            rest[name] = weights[key]
            check_finite(rest[name], f"{weights.path}: tensor '{key}'")
    check_patterns(config, list(halves), source.name, only_ranks=True)
    ranks = ByPattern(config.rank_pattern, config.r)
    alphas = ByPattern(config.alpha_pattern, config.lora_alpha)
    pairs = {}
    for module, found in halves.items():
        if found != {"A", "B"}:
            raise UnmergeableAdapterError(
                f"{source.name}: layer '{module}' lacks its lora_{'AB'.strip(*found)} tensor."
            )
        rank, alpha = ranks[module], alphas[module]
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        pairs[module] = _checked_pair(source, StoredPair(weights, module, scaling), rank)
    if not pairs:
        raise UnmergeableAdapterError(f"{source.name} holds no LoRA weights.")
    return pairs, rest


def _checked_pair(source: AdapterSource, pair: StoredPair, rank: int) -> StoredPair:
    A, B, module = pair.shape("A"), pair.shape("B"), pair.module
    if len(A) != 2 or len(B) != 2:
        raise UnmergeableAdapterError(f"{source.name}: layer '{module}' is no linear layer (LoRA shape {A}).")
    if not A[0] == B[1] == rank:
        raise UnmergeableAdapterError(
            f"{source.name}: layer '{module}' has LoRA shapes {A} and {B}, but its config says rank {rank}."
        )
    if 0 in (*A, *B):
        raise UnmergeableAdapterError(f"{source.name}: layer '{module}' has an empty LoRA, of shapes {A} and {B}.")
    return pair


def _single_task(
    source: AdapterSource,
    config: LoraConfig,
    statistics: AdapterStatistics,
    pairs: dict[str, StoredPair],
    rest: dict[str, Tensor],
) -> TaskAdapter:
    if len(statistics.tasks) != 1:
        raise UnmergeableAdapterError(
            f"{source.name} is no merge, but its statistics hold {len(statistics.tasks)} tasks."
        )
    measured = statistics.tasks[0]
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
    return TaskAdapter(
        name=getattr(config, "task_name", None) or measured.name or source.short_name,
        weight=1.0,
        provenance={"source": source.public_name, "revision": source.revision, "sha256": _sha256(source.folder)},
        statistics=measured,
        deltas={module: delta_of_adapter(pair, measured, module, source.name) for module, pair in pairs.items()},
        projectors=projectors,
        source=source.name,
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


def _is_saved_whole(module: str, config: LoraConfig) -> bool:
    """Whether `modules_to_save` names the module or one around it; PEFT compares the ends of paths."""
    around = [module.rsplit(".", levels)[0] for levels in range(module.count(".") + 1)]
    return any(path.endswith(name) for path in around for name in config.modules_to_save or [])


def _tasks_of_merge(
    source: AdapterSource,
    config: MAnyConfig,
    statistics: AdapterStatistics,
    pairs: dict[str, StoredPair],
    rest: dict[str, Tensor],
) -> tuple[TaskAdapter, ...]:
    """Take a merge apart: the statistics hold every `A_t`; the `B_t` are columns of the merged `B`, or there too."""
    named = config.tasks or []
    if len(named) != len(statistics.tasks):
        raise UnmergeableAdapterError(
            f"{source.name} names {len(named)} tasks, but its statistics hold {len(statistics.tasks)}."
        )
    columns = dict.fromkeys(pairs, 0)
    unstacked = {module for task in statistics.tasks for module in task.lora_B if module in task.deltas}
    tasks = []
    for about, measured in zip(named, statistics.tasks):
        name = f"{source.name}, task '{about['name']}'"
        if measured.name != about["name"]:
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
        for projector, routing in (config.routing or {}).items():
            order = [task["name"] for task in routing["tasks"]]
            if about["name"] in order and len(measured.prototypes.get(projector, ())) != routing["width"]:
                raise UnmergeableAdapterError(f"{name}: its statistics lack its prototype at '{projector}'.")
            prefix = f"{projector}.experts.task_{order.index(about['name'])}." if about["name"] in order else None
            expert = {k.removeprefix(prefix): v for k, v in rest.items() if prefix and k.startswith(prefix)}
            projectors |= {projector: expert} if expert else {}
        for projector, averaged in (config.averaged_projectors or {}).items():
            if about["name"] in averaged:  # the mean of these tasks' projectors stands for each of them
                prefix = f"{projector}."
                mean = {k.removeprefix(prefix): v for k, v in rest.items() if k.startswith(prefix)}
                if not mean:
                    raise UnmergeableAdapterError(f"{source.name} lacks the tensors of its projector '{projector}'.")
                projectors[projector] = mean
        tasks.append(
            TaskAdapter(
                name=about["name"],
                weight=float(about["weight"]),
                provenance={key: about.get(key) for key in ("source", "revision", "sha256")},
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
