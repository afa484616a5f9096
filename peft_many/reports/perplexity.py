"""The perplexity of a text by a model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional
from tqdm.auto import tqdm

from ..statistics.forward import state_kept

_WINDOW = 512  # tokens of a text that are seen at once


def perplexity_of(model: Any, tokenizer: Any, text: str, progress: bool = False) -> float:
    """`exp` of the mean negative log-likelihood of a text's tokens, read in windows that follow one another."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    if ids.shape[1] < 2:
        raise ValueError("The text for the perplexity has fewer than two tokens.")
    total = 0.0
    windows = tqdm(range(0, ids.shape[1] - 1, _WINDOW), desc="Reading the text", disable=not progress)
    with state_kept(model), torch.inference_mode():
        for start in windows:
            window = ids[:, start : start + _WINDOW + 1]
            logits = model(input_ids=window[:, :-1], attention_mask=torch.ones_like(window[:, :-1])).logits
            total += functional.cross_entropy(logits[0].float(), window[0, 1:], reduction="sum").item()
    return math.exp(total / (ids.shape[1] - 1))
