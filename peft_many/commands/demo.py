"""`peft-many demo`."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .running import FAILED, say_error

_NEEDED = ("matplotlib", "rich", "sklearn")


def demo(
    output: Annotated[Path, typer.Option(help="Where adapters, demo.png and results.json go.")] = Path("many-demo"),
    seed: Annotated[int, typer.Option(help="Another seed draws other pictures and weights.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps for each task, the same for all methods.")] = 450,
    tests: Annotated[int, typer.Option(min=1, help="Test pictures for each task.")] = 300,
) -> None:
    """Teach a tiny LLaVA four conflicting tasks, merge their adapters, and see who remembers what.

    Under four minutes on two CPU cores.

    [bold]Examples[/bold]

    peft-many demo

    peft-many demo --seed 1 --output many-demo-1
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        say_error(f"The demo needs {', '.join(missing)}: pip install 'peft-many[demo]'.")
        raise typer.Exit(FAILED)
    from transformers.utils import logging

    from ..demo.run import run

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    run(output, seed=seed, steps=steps, tests=tests)
