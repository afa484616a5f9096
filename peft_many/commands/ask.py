"""`peft-many ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import arguments as a
from .running import print_json


def ask(
    merge: a.Merge,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.", show_default=False)],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", help="An image that the question is about. Can be given several times."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also ask the base model and each task's adapter alone.")
    ] = False,
    base_model: a.Base = None,
    system: a.System = None,
    max_new_tokens: a.MaxNewTokens = 64,
    device: a.ModelDevice = None,
    load_in: a.LoadIn = None,
    quiet: a.Quiet = False,
    json: a.Json = False,
) -> None:
    """Ask a merge a question; shows the answer, and which tasks' projectors and LoRAs it came from.

    With --compare, each task's adapter answers too. The adapters' files are not needed: the merge contains them.

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
        show_answer(found, len(image or []))
