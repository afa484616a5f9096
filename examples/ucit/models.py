"""The base model with its processor, by Hub id or folder, and the processes that it runs in."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

LLAVA = "llava-hf/llava-1.5-7b-hf"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_base(model_id: str, dtype: str) -> tuple[PreTrainedModel, Any]:
    """A base model in `dtype`, on the CPU, and its processor.

    Raises:
        ValueError: The dtype is none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=DTYPES[dtype])
    return model, AutoProcessor.from_pretrained(model_id)


def processes() -> PartialState:
    """What `accelerate launch` started: how many processes, and this one's device; CPUs if there is nothing else."""
    return PartialState(cpu=not torch.accelerator.is_available())
