"""`peft-many ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import arguments as a
from .running import print_json


def ask(
    merge: Annotated[str, typer.Argument(help="The folder or Hub id of a merge.", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="What it is about; repeat it.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask the base model and each task's adapter alone, too.")
    ] = False,
    base_model: a.Base = None,
    system: a.System = None,
    max_new_tokens: a.MaxNewTokens = 64,
    device: a.ModelDevice = None,
    load_in: a.LoadIn = None,
    json: a.Json = False,
) -> None:
    """Ask a merge something: its answer, and which tasks it took the question for.

    With --compare, the tasks' own adapters answer too: they are taken from the merge, which holds all of them.

    [bold]Examples[/bold]

    peft-many ask merged --image x.png "How many?"

    peft-many ask me/merged --image x.png "How many?" --compare --json
    """
    from .. import ask_merge
    from .display import show_answer

    found = ask_merge(
        merge,
        question,
        image or [],
        compare=compare,
        base_model=base_model,
        system=system,
        max_new_tokens=max_new_tokens,
        device=device,
        model_options=a.model_options(load_in),
    )
    if json:
        print_json(found)
    else:
        show_answer(found)
