"""What is in an adapter's folder: tasks, where they come from, sizes, statistics and routing; nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from typing_extensions import Unpack

from ..algebra.precision import without_autocast
from ..files.adapter import TaskAdapter, read_adapter
from ..files.card import CARD_NAME
from ..files.errors import UnmergeableAdapterError
from ..files.peft_methods import name_of
from ..files.source import AdapterSource, open_weights, read_config
from ..files.tensor_file import TensorFile
from ..files.tensor_keys import tensor_keys
from ..files.untrusted import NONSENSE_ERRORS
from ..hub.sources import ADAPTER_FILES, HubArguments, find_adapter
from ..merging.prepare import AdapterPath
from ..records import ExpectedRouting, Operation, TaskRecord, merge_of


@dataclass(frozen=True)
class TaskSummary:
    """One task of a merge, planned or made, or of another adapter.

    Args:
        name (`str`): Its name in the merge.
        source (`str`): The adapter that it comes from.
        weight (`float`): `w_t`.
        layers (`int`): How many layers it trained.
        ranks (`tuple[int, int]`): The smallest and largest `r_t`.
        projectors (`list[str]`): The projectors of its own.
        samples (`int`): What it was measured on; 0 without statistics.
        images (`int`): How many images were among them.
        instructions (`int`): Of how many instructions the words were read.
    """

    name: str
    source: str
    weight: float
    layers: int
    ranks: tuple[int, int]
    projectors: list[str]
    samples: int
    images: int
    instructions: int


@dataclass(frozen=True)
class TaskInspection(TaskSummary):
    """One task of an adapter: what [`TaskSummary`] says of it, and more.

    Args:
        revision (`str`, *optional*): Its commit, if it came from the Hub.
        sha256 (`str`): Of that adapter's weights file.
        pooled (`list[str]`): Of a pool, the names of the tasks in it.
        measured_layers (`int`): Layers whose inputs were measured.
        covariances (`int`): Distinct covariances among these.
        covariance_ranks (`tuple[int, int]`, *optional*): How many directions they keep; `None` if there are none.
        energy (`float`, *optional*): Share of the covariances' energy in these directions, the mean over them.
        statistics_bytes (`int`): What it takes in the file of statistics, of a merge with its LoRA's `A`.
        prototypes (`dict[str, int]`): By projector, the width of the visual prototype.
        spreads (`list[str]`): The projectors for which `router="gaussian"` has what it needs.
        instruction_width (`int`, *optional*): The width of the instructions' prototype.
        prompts (`int`): How many prompts were kept, word for word.
        interference (`float`, *optional*): Of a merge's task, what merging costs it (`MergeReport.interference`).
        datasets (`list[str]`): What it was trained on, where its adapter's model card says so.
    """

    revision: str | None
    sha256: str
    pooled: list[str]
    measured_layers: int
    covariances: int
    covariance_ranks: tuple[int, int] | None
    energy: float | None
    statistics_bytes: int
    prototypes: dict[str, int]
    spreads: list[str]
    instruction_width: int | None
    prompts: int
    interference: float | None
    datasets: list[str]


@dataclass(frozen=True)
class AdapterInspection:
    """An adapter, or a merge of several.

    Args:
        name (`str`): What it was asked for by.
        revision (`str`, *optional*): Its commit, if it is on the Hub.
        peft_type (`str`): `"MANY"`, `"LORA"` or another PEFT method.
        is_merge (`bool`): Whether it is a merge.
        base_model (`str`, *optional*): As its config says.
        layers (`int`): How many layers it adapts.
        ranks (`tuple[int, int]`): The smallest and largest rank of a layer.
        parameters (`int`): Of everything in its weights file.
        dtype (`str`): Of its weights, projectors aside.
        files (`dict[str, int]`): Sizes in bytes.
        options (`dict[str, Any]`): Of a merge, as [`MergeOptions`] describes them.
        routing (`dict[str, list[str]]`): Of a merge: by routed projector, the tasks that images are sent to.
        expected_routing (`dict[str, ExpectedRouting]`):
            Of a merge: by routed projector, and for gates under `"gate_lora"`, where inputs are expected to go.
        averaged_projectors (`dict[str, list[str]]`): Of a merge: by averaged projector, the tasks in the mean.
        tasks (`list[TaskInspection]`): Its tasks.
        operations (`list[Operation]`): What was done to make it, as its config records it.
        problem (`str`, *optional*): Why it cannot be merged; then its tasks are not known.
    """

    name: str
    revision: str | None
    peft_type: str
    is_merge: bool
    base_model: str | None
    layers: int
    ranks: tuple[int, int]
    parameters: int
    dtype: str
    files: dict[str, int]
    options: dict[str, Any]
    routing: dict[str, list[str]]
    expected_routing: dict[str, ExpectedRouting]
    averaged_projectors: dict[str, list[str]]
    tasks: list[TaskInspection]
    operations: list[Operation]
    problem: str | None = None


@without_autocast()
def inspect_adapter(adapter: AdapterPath, **hub: Unpack[HubArguments]) -> AdapterInspection:
    """Look into an adapter or a merge, without loading any base model.

    Args:
        adapter (`str`): A folder or Hub id (`"me/adapter@revision"`).
        **hub: `token`, `cache_dir` and `local_files_only`, as in [`~huggingface_hub.snapshot_download`].

    Returns:
        [`AdapterInspection`]: What is there; `dataclasses.asdict` makes it JSON.

    Raises:
        UnmergeableAdapterError: It is damaged.
        AdapterNotFoundError: It is neither a folder nor reachable on the Hub.
        StatisticsError: Its statistics are damaged.

    Example:

        ```py
        >>> from peft_many import inspect_adapter

        >>> [task.name for task in inspect_adapter("merged").tasks]
        ['clevr', 'iconqa']
        ```
    """
    source = find_adapter(adapter, **hub)
    config, weights = read_config(source), open_weights(source)
    tasks: Sequence[TaskAdapter] = ()
    problem = None
    try:
        tasks = read_adapter(source).tasks
    except UnmergeableAdapterError as error:
        problem = error
    try:
        return _inspected(source, config, weights, tasks, problem)
    except NONSENSE_ERRORS:
        if problem is None:
            raise
        raise problem from None


def _inspected(
    source: AdapterSource,
    config: PeftConfig,
    weights: TensorFile,
    tasks: Sequence[TaskAdapter],
    problem: UnmergeableAdapterError | None,
) -> AdapterInspection:
    layers = {} if config.is_prompt_learning else tensor_keys(config, weights).own
    deltas = tasks[0].deltas if tasks else {}
    ranks = [weights.shape(key)[0] for key in weights if key.endswith(".lora_A.weight")]
    ranks = ranks or [delta.rank for delta in deltas.values()]
    first = min((key for keys in layers.values() for key in keys), default=min(weights))
    merge = merge_of(config)
    record = merge or getattr(config, "pool", None)
    told = {task.name: task for task in merge.tasks} if merge is not None else {}
    return AdapterInspection(
        name=source.name,
        revision=source.revision,
        peft_type=name_of(config),
        is_merge=merge is not None,
        base_model=config.base_model_name_or_path,
        layers=len(layers or deltas),
        ranks=(min(ranks, default=0), max(ranks, default=0)),
        parameters=sum(math.prod(weights.shape(key)) for key in weights),
        dtype=str(weights.dtype(first)).removeprefix("torch."),
        files={
            name: path.stat().st_size
            for name in [*ADAPTER_FILES, CARD_NAME]
            if (path := source.folder / name).is_file()
        },
        options=merge.options.describe() if merge is not None else {},
        routing={name: routed.names for name, routed in merge.routing.items()} if merge is not None else {},
        expected_routing=merge.expected_routing if merge is not None else {},
        averaged_projectors=merge.averaged_projectors if merge is not None else {},
        tasks=[_inspect_task(task, told.get(task.name)) for task in tasks],
        operations=record.operations if record is not None else [],
        problem=None if problem is None else str(problem),
    )


def known_of(task: TaskAdapter) -> dict[str, Any]:
    """The fields of [`TaskSummary`] but `source`; neither weights nor covariances are read for them."""
    ranks = [delta.rank for delta in task.deltas.values()]
    return {
        "name": task.name,
        "weight": task.weight,
        "layers": len(ranks),
        "ranks": (min(ranks, default=0), max(ranks, default=0)),
        "projectors": sorted(task.projectors),
        "samples": task.statistics.samples,
        "images": task.statistics.images,
        "instructions": task.statistics.instructions.count if task.statistics.instructions is not None else 0,
    }


def _inspect_task(task: TaskAdapter, told: TaskRecord | None) -> TaskInspection:
    measured = task.statistics
    covariances = [one.covariance for one in measured.inputs.values()]
    kept = [covariance.rank for covariance in covariances]
    # The remainder is in every direction, in those that are kept too.
    energies = [1 - c.remainder * (c.width - c.rank) / c.trace for c in covariances if c.trace > 0]
    return TaskInspection(
        **known_of(task),
        source=task.origin.source or "",
        revision=task.origin.revision,
        sha256=task.origin.sha256,
        pooled=[within.name for within in task.origin.pooled],
        measured_layers=len(measured.input_of),
        covariances=len(covariances),
        covariance_ranks=(min(kept), max(kept)) if kept else None,
        energy=sum(energies) / len(energies) if energies else None,
        statistics_bytes=measured.nbytes,
        prototypes={name: len(seen.prototype) for name, seen in measured.projectors.items()},
        spreads=sorted(name for name, seen in measured.projectors.items() if seen.spread is not None),
        instruction_width=len(measured.instructions.prototype) if measured.instructions is not None else None,
        prompts=measured.kept_prompts,
        interference=None if told is None else told.interference,
        datasets=task.origin.datasets,
    )
