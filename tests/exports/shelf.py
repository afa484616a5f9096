"""Adapters, merges and base models on disk, for all exports."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from peft_many import merge_adapter_files
from tests import tiny
from tests.adapters import base, make


class Shelf:
    """Makes adapters `a`, `b`, `c` (without projector) of a family and its base model, once each."""

    def __init__(self, root: Path, family: str = "llava") -> None:
        self.root, self.family = root, family
        options = {"a": {}, "b": {"r": 2, "use_rslora": True}, "c": {"projector_modules": []}}
        self.adapters = {
            name: make(root / name, family, seed=seed, task_name=name, **more).folder
            for seed, (name, more) in enumerate(options.items())
        }
        self.base = root / "base"
        base(family).save_pretrained(self.base)

    @classmethod
    def with_merge(cls, root: Path) -> Shelf:
        """With a merge of two adapters in `merged`, and a tokenizer beside the base model."""
        shelf = cls(root)
        shelf.merge("ab", root / "merged")
        (shelf.base / "tokenizer.json").write_text("{}")
        return shelf

    def merge(self, names: str, output: Path, **options) -> Path:
        return merge_adapter_files([self.adapters[name] for name in names], output, progress=False, **options)


@torch.no_grad()
def text_logits(model: nn.Module) -> torch.Tensor:
    """Outputs on two rows of text alone, float32."""
    tokens = torch.tensor([[1, *tiny.TEXT_TOKENS[:9]], [1, *tiny.TEXT_TOKENS[20:29]]])
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float()
