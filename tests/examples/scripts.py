"""The scripts of `examples/` as modules, and what they need at toy size."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"

FAST = ["--learning-rate", "4e-3", "--batch-size", "16", "--epochs", "3", "--rank", "8", "--samples", "64", "--cpu"]


def script(name: str) -> ModuleType:
    """A script of `examples/`; they import each other as neighbours."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def write_toy(folder: Path, examples: int = 96) -> Path:
    """A tiny base model with its processor, and three tasks' pictures and questions."""
    script("toy_data").main([str(folder), "--examples", str(examples)])
    return folder


def training_arguments(toy: Path, task: str, output: Path, more: Sequence[str] = FAST) -> list[str]:
    """What the training scripts are called with."""
    named = ["--data", toy / f"{task}.jsonl", "--task-name", task, "--output", output, "--model", toy / "model"]
    return [*map(str, named), *more]
