"""Checks of what was read from somebody else's JSON, by the types that records declare."""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError

_DEEPEST = 20


class RecordError(ValueError):
    """A record in somebody else's file cannot be used; the message says what is wrong in it."""


def check_types(schema: type, values: Mapping[str, Any]) -> None:
    """Raise `TypeError` unless values have the types that a dataclass or `TypedDict` declares for these names.

    Lists of a dataclass must hold instances of it.
    """
    for name, value in values.items():
        try:
            validate_typed_dict(_one_field(schema, name), {name: value})
        except StrictDataclassError:
            raise TypeError(f"`{name}` cannot be {value!s:.80}") from None


@functools.cache
def _one_field(schema: type, name: str) -> Any:
    return TypedDict(name, {name: typing.get_type_hints(schema)[name]})  # type: ignore[operator]


def nonsense(value: Any) -> str | None:
    """What no field can hold, in words: numbers that are not finite, text that is no Unicode, very deep nesting."""
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
