"""`peft-many` itself; the commands are in the files beside this one."""

from __future__ import annotations

from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated, Any

import typer

from ..version import __version__
from .ask import ask
from .edit import add, pool, remove
from .evaluate import evaluate
from .export import export
from .look import inspect, report
from .measure import measure
from .merge import merge, plan
from .refit import refit
from .running import Commands

app = typer.Typer(
    name="peft-many",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Merge task adapters of multimodal language models without forgetting (MAny, arXiv 2604.14016)."""


def _help(command: Callable[..., Any]) -> str:
    """A command's docstring with each paragraph in one line, as typer breaks lines where it does."""
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for command in (measure, plan, merge, ask, evaluate, inspect, report, add, remove, refit, pool, export):
    app.command(help=_help(command))(command)
