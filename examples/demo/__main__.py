"""`python -m examples.demo`: a tiny LLaVA that learns four conflicting tasks, and who remembers what after merging."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Annotated

import typer

_NEEDED = ("matplotlib", "rich", "sklearn")

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where adapters, demo.png and results.json go.")] = Path("many-demo"),
    seed: Annotated[int, typer.Option(help="Another seed draws other pictures and weights.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps for each task, the same for all methods.")] = 450,
    tests: Annotated[int, typer.Option(min=1, help="Test pictures for each task.")] = 300,
) -> None:
    """Teach a tiny LLaVA four conflicting tasks, merge their adapters, and see who remembers what.

    Under four minutes on two CPU cores.

    python -m examples.demo --seed 1 --output many-demo-1
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        typer.secho(f"The demo needs {', '.join(missing)}: pip install -e '.[demo]'", err=True, fg="red")
        raise typer.Exit(1)
    from transformers.utils import logging

    from .run import run

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    run(output, seed=seed, steps=steps, tests=tests)


if __name__ == "__main__":
    app()
