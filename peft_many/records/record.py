"""`MergeRecord`: what a merge's config says of how it was made. Each part checks itself by the types of its fields."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import Self

from .checking import check_types, nonsense
from .options import MergeOptions

Number = int | float
_MOST = 10_000  # entries of a list in somebody else's record; real ones have tens


@dataclass(frozen=True)
class _Record:
    """A part of a record; its fields have the types that they are declared with."""

    def __post_init__(self) -> None:
        check_types(type(self), {one.name: getattr(self, one.name) for one in dataclasses.fields(self)})

    @classmethod
    def read(cls, content: Any) -> Self:
        """A record from JSON; an error if it is none."""
        wrong = nonsense(content)
        if wrong is not None:
            raise ValueError(f"it cannot hold {wrong}")
        return _from_json(cls, content)

    def to_json(self) -> dict[str, Any]:
        """All fields that differ from their default, as JSON; [`read`] reads it."""
        values = {one.name: (getattr(self, one.name), _default(one)) for one in dataclasses.fields(self)}
        return {name: _json(value) for name, (value, default) in values.items() if value != default}


def _is_record(kind: Any) -> bool:
    return typing.get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, _Record)


def _from_json(kind: Any, value: Any) -> Any:
    """A value from JSON, of the type that its field is declared with."""
    if kind is MergeOptions:
        return MergeOptions.read(value, foreign=True)
    if value is not None and _is_record(typing.get_args(kind)[:1] and typing.get_args(kind)[0]):
        kind = typing.get_args(kind)[0] if type(None) in typing.get_args(kind) else kind
    inner: Any = (typing.get_args(kind) or (None,))[-1]  # what a list or dict holds
    if _is_record(inner) and isinstance(value, dict):
        return {key: _from_json(inner, one) for key, one in value.items()}
    if _is_record(inner):
        if not isinstance(value, list) or len(value) > _MOST:
            raise TypeError(f"{inner.__name__}: a list of at most {_MOST} is expected")
        return [_from_json(inner, one) for one in value]
    if not _is_record(kind):
        return value
    declared = typing.get_type_hints(kind)
    return kind(**{name: _from_json(declared.get(name), one) for name, one in value.items()})


def _default(one: dataclasses.Field[Any]) -> Any:
    return one.default if one.default_factory is dataclasses.MISSING else one.default_factory()


def _json(value: Any) -> Any:
    if isinstance(value, _Record):
        return value.to_json()
    if isinstance(value, MergeOptions):
        return value.describe()
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    return [_json(inner) for inner in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class PooledTask(_Record):
    """A task inside a pool, which can no longer be taken out.

    Args:
        name (`str`): Its name.
        weight (`float`): `w_t`.
        sha256 (`str`): Of its adapter's weights file.
        source (`str`, *optional*): Where the adapter came from.
        revision (`str`, *optional*): Its commit, if it came from the Hub.
    """

    name: str
    weight: Number
    sha256: str
    source: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Origin(_Record):
    """Where a task's adapter came from.

    Args:
        sha256 (`str`): Of its weights file.
        source (`str`, *optional*): The name of its folder, or its Hub id.
        revision (`str`, *optional*): Its commit, if it came from the Hub.
        options (`dict[str, Any]`): Options that it was trained with: `peft_type`, `r`, `lora_alpha` and others.
        datasets (`list[str]`): The data sets that its model card names.
        pooled (`list[PooledTask]`): Of a pool, the tasks in it.
        projectors_left_out (`list[str]`): Projectors that were not kept, because the task had the weight 0.
        base_tensors (`list[str]`): Tensors of the base model that lay beside its adapter, and now beside the merge.
    """

    sha256: str
    source: str | None = None
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    pooled: list[PooledTask] = field(default_factory=list)
    projectors_left_out: list[str] = field(default_factory=list)
    base_tensors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TaskRecord(_Record):
    """One task of a merge.

    Args:
        name (`str`): Its name.
        weight (`float`): `w_t`.
        origin ([`Origin`]): Where its adapter came from.
        samples (`int`): How many samples it was measured on.
        images (`int`): How many images were among them.
        interference (`float`, *optional*): What merging costs it (`MergeReport.interference`).
    """

    name: str
    weight: Number
    origin: Origin
    samples: int = 0
    images: int = 0
    interference: Number | None = None


@dataclass(frozen=True)
class Operation(_Record):
    """One thing that was done to make a merge or a pool.

    Args:
        kind (`str`): `"merge"`, `"add"`, `"remove"`, `"change"`, `"pool"` or `"refit"`.
        tasks (`list[str]`): The tasks that took part in it and are still there.
        options (`dict[str, Any]`): With what options.
        peft_many (`str`): With what version.
        forgotten (`int`): How many tasks took part that were removed since; not even their names are kept.
    """

    kind: str
    tasks: list[str]
    options: dict[str, Any]
    peft_many: str
    forgotten: int = 0


@dataclass(frozen=True)
class RoutedTask(_Record):
    """A task that images are routed to, and whether it trained the projector; if not, the base model's serves."""

    name: str
    trained: bool


@dataclass(frozen=True)
class RoutedProjector(_Record):
    """What must be known of a routed projector before its tensors are loaded.

    Args:
        width (`int`): Features of a prototype.
        tasks (`list[RoutedTask]`): In the order of the prototypes.
        directions (`int`, *optional*): How many directions the metric of a Gaussian router has.
    """

    width: int
    tasks: list[RoutedTask]
    directions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1 or (self.directions or 0) < 0:
            raise ValueError(f"a routed projector cannot have the width {self.width}")

    @property
    def names(self) -> list[str]:
        """The names of the tasks, in the order of the prototypes."""
        return [task.name for task in self.tasks]


@dataclass(frozen=True)
class RoutedInstructions(_Record):
    """What must be known of the router of instructions before its tensors are loaded.

    Args:
        width (`int`): Features of a prototype.
        tasks (`list[str]`): The names of the tasks, in the order of the prototypes.
        directions (`int`): How many directions its metric has.
        distances (`list[float]`): Of each task's own instructions, the mean square, which `abstain_above` multiplies.
    """

    width: int
    tasks: list[str]
    directions: int
    distances: list[Number]

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = len(self.distances) == len(self.tasks) and min(self.distances, default=1) > 0
        if self.width < 1 or self.directions < 0 or not fits:
            raise ValueError(f"a router of instructions cannot have the width {self.width}, or {self.distances!r:.80}")


@dataclass(frozen=True)
class MergeRecord(_Record):
    """What a merge was made of and how: `MAnyConfig.merge`, and `"merge"` in `adapter_config.json`.

    Args:
        options ([`MergeOptions`]): How it was made, with nothing left open.
        tasks (`list[TaskRecord]`): The tasks that it was made of.
        operations (`list[Operation]`): What was done to make it, in its order.
        routing (`dict[str, RoutedProjector]`): The routed projectors.
        instructions ([`RoutedInstructions`], *optional*): The router of instructions, if gates go by these.
        averaged_projectors (`dict[str, list[str]]`): With `projectors="mean"`, by projector the tasks in the mean.
        task_ranks (`list[int]`, *optional*): With `gate_lora`, the rank of each task's block in a layer.
        task_rank_pattern (`dict[str, list[int]]`): The layers where it is another, as in `rank_pattern`.
    """

    options: MergeOptions
    tasks: list[TaskRecord]
    operations: list[Operation] = field(default_factory=list)
    routing: dict[str, RoutedProjector] = field(default_factory=dict)
    instructions: RoutedInstructions | None = None
    averaged_projectors: dict[str, list[str]] = field(default_factory=dict)
    task_ranks: list[int] | None = None
    task_rank_pattern: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.names
        if len(set(names)) < len(names):
            raise ValueError("two of its `tasks` have the same name")
        for projector, routed in self.routing.items():
            if not routed.tasks or not set(routed.names) <= set(names) or len(set(routed.names)) < len(routed.names):
                raise ValueError(f"the tasks that `routing` gives for '{projector}' are not its `tasks`")
        asked = [] if self.instructions is None else self.instructions.tasks
        if not set(asked) <= set(names) or len(set(asked)) < len(asked):
            raise ValueError("the tasks that `instructions` gives are not its `tasks`")
        for ranks in (*self.task_rank_pattern.values(), *([self.task_ranks] if self.task_ranks else [])):
            if len(ranks) != len(names) or min(ranks, default=0) < 0:
                raise ValueError(f"`task_ranks` cannot be {ranks!r:.80} with {len(names)} tasks")
        if self.options.gate_lora and self.task_ranks is None:
            raise ValueError("it has `gate_lora`, but no `task_ranks`")
        if self.options.gates_by_instructions != (self.instructions is not None):
            raise ValueError("`gate_by` and its `instructions` contradict each other")
        if self.routing and None in (self.options.router, self.options.temperature):
            raise ValueError("it routes projectors, but lacks a router or a temperature")

    @property
    def names(self) -> list[str]:
        """The names of the tasks, in their order."""
        return [task.name for task in self.tasks]

    @property
    def is_routed(self) -> bool:
        """Whether images or instructions choose among its tasks."""
        return bool(self.routing) or self.instructions is not None


@dataclass(frozen=True)
class PoolRecord(_Record):
    """What a task adapter was pooled from: `MAnyConfig.pool`, and `"pool"` in `adapter_config.json`.

    Args:
        tasks (`list[PooledTask]`): The tasks in it.
        operations (`list[Operation]`): What was done to make it, in its order.
    """

    tasks: list[PooledTask]
    operations: list[Operation] = field(default_factory=list)


def merge_of(config: Any) -> MergeRecord | None:
    """What an adapter's config says of how it was merged; `None` of configs that are no merge's, of any PEFT type."""
    merge = getattr(config, "merge", None)
    return merge if isinstance(merge, MergeRecord) else None
