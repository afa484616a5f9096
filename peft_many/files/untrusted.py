"""What the config of an adapter that somebody published may say, before anything is made or allocated by it."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, TypedDict, Union

from peft import PeftConfig

from ..tuner.config import MAnyConfig
from .peft_methods import name_of
from .stored_delta import UnmergeableAdapterError
from .tensor_file import TensorFile

# Up to here a config is taken at its word: a LoRA of this rank is smaller than the base model's layers.
UNBACKED_RANK = 512
# What Python code raises on values of a kind that it was not written for.
NONSENSE_ERRORS = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RecursionError, TypeError)
LARGEST_CONFIG = 16 << 20  # bytes; JSON takes many times its size in memory
_DEEPEST = 20


class MalformedAdapterError(UnmergeableAdapterError):
    """An adapter's files hold nonsense or contradict each other, so it is neither loaded nor merged."""


class _Merged(TypedDict):
    name: str
    weight: float
    sha256: str


class _MergedTask(_Merged, total=False):
    source: str | None
    revision: str | None
    pooled: list[_Merged]
    samples: int
    images: int
    interference: float
    options: dict[str, Any]
    datasets: list[str]
    projectors_left_out: list[str]


class _Operation(TypedDict):
    operation: str
    tasks: list[str]
    options: dict[str, Any]
    peft_many: str


class _RoutedTask(TypedDict):
    name: str
    trained: bool


class _Routed(TypedDict):
    width: int
    tasks: list[_RoutedTask]


class _Routing(_Routed, total=False):
    directions: int


class _Method(TypedDict):
    name: str
    source: str
    options: dict[str, Any]


# Where the annotations of `LoraConfig`, or those of `MAnyConfig`, are vaguer or narrower than what is used.
_HINTS: dict[str, Any] = {
    "lora_alpha": float,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "tasks": list[_MergedTask] | None,
    "operations": list[_Operation] | None,
    "pooled": list[_Merged] | None,
    "routing": dict[str, _Routing] | None,
    "method": _Method | None,
    "statistics": Any,
}


def check_config(config: PeftConfig, source: str) -> None:
    """Check that everything in a config that was read from a file has the type that its field is declared with.

    Numbers must be finite, ranks positive, and what a merge says of its tasks consistent.

    Args:
        config ([`~peft.PeftConfig`]): Of any PEFT type.
        source (`str`): The adapter's name, for messages.

    Raises:
        MalformedAdapterError: It does not; the message names the field.
    """
    kind: Any = type(config)
    hints = {**_hints_of(kind), **(_HINTS if name_of(config) in ("LORA", "MANY") else {})}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        if field.name == "statistics" or (value is None and field.default is None):  # whatever it is annotated with
            continue
        if (wrong := _nonsense(value)) is not None or not _fits(value, hints[field.name]):
            shown = wrong if wrong is not None else f"{value!s:.80}"
            raise _malformed(source, f"`{field.name}` cannot be {shown}")
    ranks = [getattr(config, "r", 1), *(getattr(config, "rank_pattern", None) or {}).values()]
    ranks = [rank for rank in ranks if isinstance(rank, int)]  # AdaLoRA's are lists of which directions it kept
    if not all(rank > 0 for rank in ranks):
        raise _malformed(source, f"ranks must be positive, but it has {min(ranks)}")
    if isinstance(config, MAnyConfig):
        _check_merge(config, source)


def _check_merge(config: MAnyConfig, source: str) -> None:
    names = [task["name"] for task in config.tasks or []]
    if len(set(names)) < len(names):
        raise _malformed(source, "two of its `tasks` have the same name")
    if config.tasks is None and (config.routing or config.averaged_projectors):
        raise _malformed(source, "it routes projectors, but names no `tasks`")
    if config.ridge is not None and config.ridge < 0:
        raise _malformed(source, f"`ridge` cannot be {config.ridge}")
    if config.abstain_above is not None and (config.abstain_above <= 0 or config.router != "gaussian"):
        raise _malformed(source, f"`abstain_above` cannot be {config.abstain_above} with the router '{config.router}'")
    for projector, routing in (config.routing or {}).items():
        routed = [task["name"] for task in routing["tasks"]]
        strange = next((name for name in routed if name not in names), None)
        if strange is not None or len(set(routed)) < len(routed) or not routed:
            raise _malformed(source, f"the tasks that `routing` gives for '{projector}' are not its `tasks`")
        if routing["width"] < 1 or routing.get("directions", 0) < 0:
            raise _malformed(source, f"`routing` gives '{projector}' a width of {routing['width']}")
    for ranks in (*config.task_rank_pattern.values(), *([config.task_ranks] if config.task_ranks else [])):
        if len(ranks) != len(names) or min(ranks, default=0) < 0:
            raise _malformed(source, f"`task_ranks` cannot be {ranks!r:.80} with {len(names)} tasks")


def check_backed(config: MAnyConfig, weights: TensorFile | None, source: str) -> None:
    """Check that what a config makes PEFT allocate is there in the weights file, whose shapes its own size bounds.

    Args:
        config ([`MAnyConfig`]): Checked by `check_config`.
        weights ([`TensorFile`], *optional*): The weights beside it; `None` if there are none.
        source (`str`): The adapter's name, for messages.

    Raises:
        MalformedAdapterError: There is less in the file than the config says.
    """
    shapes = {} if weights is None else {key: weights.shape(key) for key in weights}
    loras = [shape for key, shape in shapes.items() if ".lora_A." in key or key.endswith(".lora_embedding_A")]
    largest = max((shape[0] for shape in loras if shape), default=0)
    rank = max(config.r, *(config.rank_pattern or {}).values(), 0)
    if rank > max(UNBACKED_RANK, largest):
        raise _malformed(source, f"it has the rank {rank}, but its weights go up to rank {largest}")
    copies = sum(max(0, end - start) for start, end in config.layer_replication or [])
    if copies > max(UNBACKED_RANK, len(loras)):
        raise _malformed(source, f"`layer_replication` makes {copies} layers, but it has weights of {len(loras)}")
    indices = config.trainable_token_indices or []
    tokens = sum(map(len, indices.values())) if isinstance(indices, dict) else len(indices)
    if tokens > max(UNBACKED_RANK, *(shape[0] for key, shape in shapes.items() if "trainable_tokens" in key), 0):
        raise _malformed(source, f"it trains {tokens} tokens, but its weights hold fewer")
    for projector, routing in (config.routing or {}).items():
        _check_routing(projector, routing, shapes, source)


def _check_routing(
    projector: str, routing: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str
) -> None:
    ends = f".{projector}.prototypes"
    inside = next((key.removesuffix("prototypes") for key in shapes if f".{key}".endswith(ends)), None)
    expected: dict[str, tuple[int, ...]] = {"prototypes": (len(routing["tasks"]), routing["width"])}
    if "directions" in routing:
        expected |= {"directions": (routing["directions"], routing["width"])}
        expected |= {"variances": (routing["directions"] + 1,)}
    for name, shape in expected.items():
        found = None if inside is None else shapes.get(f"{inside}{name}")
        if found != shape:
            raise _malformed(
                source, f"it routes '{projector}' by {name} of shape {shape}, but its weights have {found or 'none'}"
            )
    experts: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        if key.startswith(f"{inside}experts."):
            task_key, _, part = key.removeprefix(f"{inside}experts.").partition(".")
            experts.setdefault(task_key, {})[part] = shape
    like = next(iter(experts.values()), {})
    for t, task in enumerate(routing["tasks"]):
        if task["trained"] and (not like or experts.get(f"task_{t}") != like):
            raise _malformed(source, f"its weights lack a tensor of '{projector}' of the task '{task['name']}'")


def check_projectors_are_there(keys: Collection[str], expected: Mapping[str, Collection[str]], source: str) -> None:
    """Check that a weights file lacks no tensor of an adapter's projectors, which PEFT would say by a bare `KeyError`.

    Args:
        keys (`Collection[str]`): What is in the file; without any nothing is checked.
        expected (`Mapping[str, Collection[str]]`): By projector, the keys of its tensors.
        source (`str`): The adapter's name, for messages.

    Raises:
        MalformedAdapterError: A tensor is missing; the message names it.
    """
    known = {key for of_one in expected.values() for key in of_one}
    # Tensors by other names may be these ones, and be renamed by the user's `key_mapping` when PEFT reads them.
    renamed = any(key not in known and ".lora_" not in key for key in keys)
    for projector, of_one in expected.items():
        missing = [key for key in of_one if key not in keys]
        has_some = any(f".{projector}." in f".{key}" for key in keys)
        if keys and missing and (has_some or not renamed):
            raise MalformedAdapterError(
                f"{source}: adapter_model.safetensors lacks the tensor '{missing[0]}' of the projector '{projector}', "
                "which its config says is trained: the file is incomplete; save or download the adapter again."
            )


def _malformed(source: str, reason: str) -> MalformedAdapterError:
    return MalformedAdapterError(f"{source}: adapter_config.json cannot be used: {' '.join(reason.split())}.")


@functools.cache
def _hints_of(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _nonsense(value: Any) -> str | None:
    """What no field can hold: numbers that are not finite, text that is no Unicode, and very deep nesting."""
    for depth, leaf in _leaves(value):
        if depth > _DEEPEST:
            return f"nested more than {_DEEPEST} deep"
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool) and not _is_finite(leaf):
            return f"{leaf!r:.40}"
        if isinstance(leaf, str) and any("\ud800" <= character <= "\udfff" for character in leaf):
            return f"{leaf!r:.40}"
    return None


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False


def _leaves(value: Any) -> Iterator[tuple[int, Any]]:
    """What is in nested containers, keys included, with how deep it is; no deeper than is allowed."""
    stack = [(0, value)]
    while stack:
        depth, inner = stack.pop()
        if isinstance(inner, (dict, list, tuple, set, frozenset)) and depth <= _DEEPEST:
            parts = [*inner, *inner.values()] if isinstance(inner, dict) else inner
            stack += [(depth + 1, part) for part in parts]
        else:
            yield depth, inner


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON has the type of an annotation; sets and tuples count as lists."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:  # PEFT accepts more than it lists
        return isinstance(value, tuple({type(argument) for argument in arguments}))
    if origin is list:
        return isinstance(value, (list, tuple, set)) and all(_fits(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, arguments[0]) and _fits(item, arguments[1]) for key, item in value.items()
        )
    if typing.is_typeddict(hint):
        known = _hints_of(hint)
        return (
            isinstance(value, dict)
            and hint.__required_keys__ <= value.keys()
            and all(_fits(value[key], of) for key, of in known.items() if key in value)
        )
    if dataclasses.is_dataclass(hint):
        return isinstance(value, (hint, dict))  # type: ignore[arg-type]
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
