"""The options of the command line for the fields of `MergeOptions`, which takes torch to import.

They are therefore listed in a file beside this one, which `scripts/document_commands.py` makes of the fields.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

Command = TypeVar("Command", bound=Callable[..., Any])
OPTIONS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
_IN_PYTHON = re.compile(r"`(\w+)=['\"]?([\w.+-]+)['\"]?`")
_KINDS = {kind.__name__: kind for kind in (bool, float, int, str)}


def as_typed(message: str) -> str:
    """A message in which options of merging are called as on the command line, not as in Python."""
    return _IN_PYTHON.sub(lambda found: _typed_option(*found.group(1, 2)) or found[0], message)


def _typed_option(name: str, value: str) -> str:
    if name not in OPTIONS:
        return ""
    typed = name.replace("_", "-")
    if value in ("True", "False"):
        return f"`--{'' if value == 'True' else 'no-'}{typed}`"
    return f"`--{typed} {value}`"


def with_merge_options(command: Command) -> Command:
    """Give a command with `**options` an option for each field of `MergeOptions`, before its `--device`."""
    signature = inspect.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    place = [one.name for one in own].index("device")
    options = [
        inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=_typed(name, **about)
        )
        for name, about in OPTIONS.items()
    ]
    parameters = [*own[:place], *options, *own[place:]]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def _typed(name: str, help: str, kind: str, choices: list[str]) -> Any:
    """The type of a command's argument, as typer reads it."""
    names = [f"--{name}/--no-{name}".replace("_", "-")] if kind == "bool" else []

    def completions(incomplete: str) -> list[str]:
        return [one for one in choices if one.startswith(incomplete)]

    return Annotated[
        _KINDS[kind] | None, typer.Option(*names, help=help, autocompletion=completions, show_default=False)
    ]
