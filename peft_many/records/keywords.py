"""The options of a merge as keywords of the functions that take them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from .options import MergeOptions

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_merge_options(function: Function) -> Function:
    """Let a function with `**options` show the fields of `MergeOptions` in its signature, as `help` and editors do."""
    signature = inspect.signature(function)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
        for one in dataclasses.fields(MergeOptions)
    ]
    known = {one.name for one in (*own, *options)}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument '{unknown}'")
        return function(*args, **kwargs)

    checked.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]
