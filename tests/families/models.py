"""Tiny random models of the families of transformers that take images and text."""

from __future__ import annotations

import copy

import torch
import transformers
from transformers import PreTrainedModel

from tests.tiny import with_random_weights

from .rows import FAMILIES, row_of
from .shrink import merged, shrink


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model of the family in evaluation mode, with random weights that the seed fixes."""
    kind = getattr(transformers, FAMILIES[family])
    settings = merged(shrink(kind.config_class().to_dict()), copy.deepcopy(row_of(family).settings))  # timm changes it
    settings.pop("model_type", None)
    return with_random_weights(kind, kind.config_class(**settings), seed, torch.float32)
