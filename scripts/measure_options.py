"""Measures what the options of merging do to a demo's accuracy: docs/how-to/options.md and statistics-size.md.

    make demo
    .venv/bin/python scripts/measure_options.py many-demo

Merges the demo's task adapters anew with each value of an option, and asks the merge about fresh test pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.mini_ucit.model import MODELS, Collator
from benchmarks.mini_ucit.training import accuracy
from examples.demo.tasks import TASKS
from peft_many import merge_adapter_sequence

VALUES = {
    "ridge": (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "temperature": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the demo's output folder")
    parser.add_argument("--tests", type=int, default=300, help="test pictures for each task")
    parser.add_argument("--seed", type=int, default=11, help="draws the test pictures")
    arguments = parser.parse_args()
    llava, console = MODELS["llava"], Console()
    prompts = Collator(llava, prompts_only=True)
    questions = {task.name: task.examples(arguments.tests, "test", arguments.seed) for task in TASKS}
    folders = [arguments.demo / "adapters" / task.name for task in TASKS]
    for option, values in VALUES.items():
        table = Table(option, *questions, "mean", title="Exact-match accuracy, %")
        for value in values:
            merged = merge_adapter_sequence(llava.load(), folders, progress=False, **{option: value})
            scores = [accuracy(merged, prompts, examples) for examples in questions.values()]
            table.add_row(f"{value:g}", *(f"{score:.1f}" for score in [*scores, sum(scores) / len(scores)]))
        console.print(table)


if __name__ == "__main__":
    main()
