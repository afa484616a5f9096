"""Adapters with nothing wrong, of every kind that there is, to be mutated."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig

from peft_many import merge_adapter_files
from tests.adapters import make


def make_good(folder: Path) -> None:
    """Task adapters `a`, `b` and `c`, a plain `lora`, and merges of a and b: `merge`, `gated`, `gaussian`, `asked`."""
    # Few layers, so that thousands of them can be tried; two share an input.
    few = {"target_modules": r".*language_model.*layers\.0\..*(q|v|down)_proj"}
    a, b = (
        make(folder / name, seed=seed, task_name=name, energy=0.99, **few).folder for seed, name in enumerate("ab")
    )
    make(folder / "c", seed=2, task_name="c", r=2, **few)
    make(folder / "lora", seed=3, kind=LoraConfig, rank_pattern={"v_proj": 2}, **few)
    merge_adapter_files([a, b], folder / "merge", progress=False)
    merge_adapter_files([a, b], folder / "gated", gate_lora=True, progress=False)
    merge_adapter_files([a, b], folder / "gaussian", router="gaussian", abstain_above=4.0, progress=False)
    merge_adapter_files([a, b], folder / "asked", gate_by="both", progress=False)
