"""What every part of a record can do: check itself by the types of its fields, and come from JSON and go there."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self

from .checking import check_types, nonsense
from .options import MergeOptions

Number = int | float
_MOST = 10_000  # entries of a list in somebody else's record; real ones have tens


@dataclass(frozen=True)
class Record:
    """A part of a record; its fields have the types that they are declared with."""

    def __post_init__(self) -> None:
        check_types(type(self), {one.name: getattr(self, one.name) for one in dataclasses.fields(self)})

    @classmethod
    def read(cls, content: Any) -> Self:
        """A record from JSON; an error if it is none."""
        if not isinstance(content, dict):
            raise TypeError(f"a mapping is expected, but it is {content!r:.40}")
        wrong = nonsense(content)
        if wrong is not None:
            raise ValueError(f"it cannot hold {wrong}")
        return _from_json(cls, content)

    def to_json(self) -> dict[str, Any]:
        """All fields that differ from their default, as JSON; [`read`] reads it."""
        values = {one.name: (getattr(self, one.name), _default(one)) for one in dataclasses.fields(self)}
        return {name: _json(value) for name, (value, default) in values.items() if value != default}


def _is_record(kind: Any) -> bool:
    return typing.get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, Record)


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
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, MergeOptions):
        return value.describe()
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    return [_json(inner) for inner in value] if isinstance(value, list) else value
