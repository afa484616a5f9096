"""What an option of merging is declared by, and the values that it may have; each check names it in its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def option_field(
    help: str,
    check: Callable[[str, Any, Sequence[str]], None] | None = None,
    *,
    default: Any = None,
    of: Sequence[str] = (),
    inherited: bool | Sequence[str] = False,
    otherwise: Any = None,
    choices: Sequence[str] = (),
    by_default: str = "",
) -> Any:
    """A field of [`MergeOptions`], with all that the rest of the package must know of it.

    `of` says where it has a meaning: with the method "lpm", with routed projectors, or with both. One that is left
    open is `inherited` from merges among the adapters where these agree (on the options named here, too), and is
    `otherwise` this, or what this makes of the options before it. The command line says `help` of it, and `by_default`
    where the default is no single value.
    """
    about = {"check": check, "of": of, "inherited": inherited, "otherwise": otherwise, "choices": choices}
    return field(default=default, metadata={**about, "help": help, "by_default": by_default})


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """It is one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, but it is {value!r}.")


def dtype(name: str, value: Any, choices: Sequence[str]) -> None:
    """It is a dtype that weights are stored in."""
    if value not in DTYPES.values():
        raise ValueError(f"`{name}` must be one of {', '.join(map(str, DTYPES.values()))}, but it is {value}.")


def flag(name: str, value: Any, choices: Sequence[str]) -> None:
    """It is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, but it is {value!r}.")


def count(name: str, value: Any, choices: Sequence[str]) -> None:
    """It is a whole number, at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a whole number, but it is {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, but it is {value}.")


def positive(name: str, value: Any, choices: Sequence[str], allowed: str = "positive and finite") -> None:
    """It is a finite number above 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a number, but it is {value!r}.")
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be {allowed}, but it is {value}.")


def not_negative(name: str, value: Any, choices: Sequence[str]) -> None:
    """It is a finite number, 0 or above."""
    if value != 0 or isinstance(value, bool):
        positive(name, value, choices, "finite and not negative")


def number(name: str, value: Any) -> float:
    """A number as YAML and command lines write it, or a `ValueError`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, but it is {value!r}.") from None
