"""`MergeRecord`: what a merge's config says of how it was made. Each part checks itself by the types of its fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .base import Number, Record
from .expected_routing import ExpectedRouting
from .options import MergeOptions

# Before the architecture of a whole model with routed projectors: who would not route them knows no such architecture.
ROUTED_PREFIX = "Routed"
TASKS_NAME = "tasks.json"  # beside exported LoRAs: whose they are (`MergeRecord.identities`)
# Of a base model: what merges with `gate_by` compare instructions with.
INSTRUCTION_ROUTER = "instruction_routers"


@dataclass(frozen=True)
class PooledTask(Record):
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
class Origin(Record):
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
class TaskRecord(Record):
    """One task of a merge.

    Args:
        name (`str`): Its name.
        weight (`float`): `w_t`.
        origin ([`Origin`]): Where its adapter came from.
        samples (`int`): How many samples it was measured on.
        images (`int`): How many images were among them.
        prompts (`int`): How many of their prompts are kept, word for word.
        interference (`float`, *optional*): What merging costs it (`MergeReport.interference`).
    """

    name: str
    weight: Number
    origin: Origin
    samples: int = 0
    images: int = 0
    prompts: int = 0
    interference: Number | None = None


@dataclass(frozen=True)
class Operation(Record):
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
class RoutedTask(Record):
    """A task that images are routed to, and whether it trained the projector; if not, the base model's serves."""

    name: str
    trained: bool


@dataclass(frozen=True)
class RouterRecord(Record):
    """What must be known of a router, for images or for instructions, before its tensors are loaded."""

    what: ClassVar[str]  # in messages
    width: int
    tasks: list[Any]
    directions: int | None
    distances: list[Number] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        distances = self.distances
        are_known = distances is None or (len(distances) == len(self.tasks) and min(distances, default=1) > 0)
        fits = are_known and (distances is None) == (self.directions is None)
        if self.width < 1 or (self.directions or 0) < 0 or not fits:
            raise ValueError(
                f"{self.what} cannot have the width {self.width}, {self.directions} directions and the distances "
                f"{distances!r:.80}"
            )

    def limits(self, above: float | None) -> list[float] | None:
        """From which squared distance on an input is not like each task's, by `abstain_above`, if from any."""
        return None if above is None or self.distances is None else [above * distance for distance in self.distances]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors, by their names."""
        found: dict[str, tuple[int, ...]] = {"prototypes": (len(self.tasks), self.width)}
        if self.directions is not None:
            found |= {"directions": (self.directions, self.width), "variances": (self.directions + 1,)}
        return found


@dataclass(frozen=True)
class RoutedProjector(RouterRecord):
    """What must be known of a routed projector before its tensors are loaded.

    Args:
        width (`int`): Features of a prototype.
        tasks (`list[RoutedTask]`): In the order of the prototypes.
        directions (`int`, *optional*): How many directions the metric of a Gaussian router has.
        distances (`list[float]`, *optional*):
            With that, the squared distance of each task's own new images, on average, which `abstain_above`
            multiplies.
    """

    what = "a routed projector"
    tasks: list[RoutedTask]
    directions: int | None = None
    distances: list[Number] | None = None

    @property
    def names(self) -> list[str]:
        """The names of the tasks, in the order of the prototypes."""
        return [task.name for task in self.tasks]


@dataclass(frozen=True)
class RoutedInstructions(RouterRecord):
    """What must be known of the router of instructions before its tensors are loaded.

    Args:
        width (`int`): Features of a prototype.
        tasks (`list[str]`): The names of the tasks, in the order of the prototypes.
        directions (`int`): How many directions its metric has.
        distances (`list[float]`):
            The squared distance of each task's own new instructions, on average, which `abstain_above` multiplies.
    """

    what = "a router of instructions"
    tasks: list[str]
    directions: int
    distances: list[Number]


@dataclass(frozen=True)
class MergeRecord(Record):
    """What a merge was made of and how: `MAnyConfig.merge`, and `"merge"` in `adapter_config.json`.

    Args:
        options ([`MergeOptions`]): How it was made, with nothing left open.
        tasks (`list[TaskRecord]`): The tasks that it was made of.
        operations (`list[Operation]`): What was done to make it, in its order.
        routing (`dict[str, RoutedProjector]`): The routed projectors.
        instructions ([`RoutedInstructions`], *optional*): The router of instructions, if gates go by these.
        expected_routing (`dict[str, ExpectedRouting]`):
            By routed projector, and for the gates under `"gate_lora"`, where inputs of the tasks are expected to go.
        averaged_projectors (`dict[str, list[str]]`): With `projectors="mean"`, by projector the tasks in the mean.
        task_ranks (`list[int]`, *optional*): With `gate_lora`, the rank of each task's block in a layer.
        task_rank_pattern (`dict[str, list[int]]`): The layers where it is another, as in `rank_pattern`.
    """

    options: MergeOptions
    tasks: list[TaskRecord]
    operations: list[Operation] = field(default_factory=list)
    routing: dict[str, RoutedProjector] = field(default_factory=dict)
    instructions: RoutedInstructions | None = None
    expected_routing: dict[str, ExpectedRouting] = field(default_factory=dict)
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
        if any(not routing.names <= set(names) for routing in self.expected_routing.values()):
            raise ValueError("the tasks that `expected_routing` gives are not its `tasks`")
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
    def identities(self) -> list[dict[str, str]]:
        """What tells its tasks from those of other merges, in their order."""
        return [{"name": task.name, "sha256": task.origin.sha256} for task in self.tasks]

    @property
    def is_routed(self) -> bool:
        """Whether images or instructions choose among its tasks."""
        return bool(self.routing) or self.instructions is not None


@dataclass(frozen=True)
class PoolRecord(Record):
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
