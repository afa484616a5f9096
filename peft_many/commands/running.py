"""How commands end: errors in one red line, warnings in yellow ones, results for people or for scripts."""

from __future__ import annotations

import dataclasses
import json
import traceback
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from .merge_options import as_typed

FAILED, WRONG_USAGE = 1, 2  # what a command exits with; the second is typer's


class Commands(TyperGroup):
    """The commands; none ends in a traceback, unless `--debug` asks for one."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort, BrokenPipeError):  # the last: whoever reads has seen enough
                raise
            except Exception as error:
                if ctx.params.get("debug") or hasattr(error, "show"):  # the latter are typer's own, of wrong usage
                    raise
                # Progress bars that were open end their line with the frames: what is said is the last line.
                traceback.clear_frames(error.__traceback__)
                say_error(_told(error))
                raise typer.Exit(FAILED) from None


def say_error(message: str) -> None:
    """Print an error where errors go."""
    typer.secho(as_typed(message), err=True, fg="red")


def print_json(result: Any) -> None:
    """Print a dataclass, or its content, for a script to read."""
    content = result if isinstance(result, dict) else dataclasses.asdict(result)
    typer.echo(json.dumps(content, indent=2, default=str))


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:  # the system's own
        return f"'{error.filename}': {error.strerror}."
    if isinstance(error, (ImportError, OSError, ValueError)):  # all of ours are; they are written for people
        return str(error)
    return (
        f"Unexpected {type(error).__name__}: {error}\nThis should not happen. `peft-many --debug …` shows where; "
        "please report that."
    )


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    if not issubclass(category, (DeprecationWarning, FutureWarning)):
        typer.secho(f"Warning: {as_typed(str(message))}", err=True, fg="yellow")
