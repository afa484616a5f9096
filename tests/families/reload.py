"""Loads saved merges in a new process, which has seen neither training nor merging."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import peft_many  # noqa: F401 - registers the adapter type
from tests.new_process import context

from .checks import EXPECTED, TOLERANCE, joint_inputs, logits
from .models import build


def new_process() -> ProcessPoolExecutor:
    """One process that has loaded nothing yet, for any number of families."""
    return ProcessPoolExecutor(1, context())


def what_is_wrong(family: str, folder: Path) -> str:
    """Load a family's merge and do again what it did when it was saved; the empty string if it does the same."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    base = build(family)
    batch = joint_inputs(base, family)
    merged = PeftModel.from_pretrained(base, str(folder))
    difference = (logits(merged, batch) - load_file(folder / EXPECTED)["logits"]).abs().amax().item()
    return "" if difference <= TOLERANCE else f"loaded in a new process, it differs by {difference:.1e}"
