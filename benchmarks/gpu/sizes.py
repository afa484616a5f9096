"""How large the models, batches and repetitions are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

IMAGE, PAD = 5, 0  # ids of tokens; those from 10 on are text


@dataclass(frozen=True)
class ModelSizes:
    """A LLaVA: the vision tower's and the language model's sizes, and a batch's."""

    vision: dict[str, Any]
    text: dict[str, Any]
    rows: int
    words: int  # in a row, beside its image

    @property
    def image_tokens(self) -> int:
        """Patches of an image, each a token."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    @property
    def tokens(self) -> int:
        """In a row."""
        return self.image_tokens + self.words

    def config(self) -> LlavaConfig:
        """That of the model, which has no weights anywhere but is made at random."""
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**self.vision),
            text_config=LlamaConfig(**self.text, pad_token_id=PAD, bos_token_id=1, eos_token_id=None),
            image_token_id=IMAGE,
            image_seq_length=self.image_tokens,
        )


@dataclass(frozen=True)
class Sizes:
    """What the costs are measured on."""

    model: ModelSizes
    trained: ModelSizes  # the small model of the training step
    dtype: torch.dtype
    tasks: int = 6
    r: int = 16
    batches: int = 8  # measured of the first task
    few_batches: int = 2  # of the others
    new_tokens: int = 32
    repeats: int = 5
    steps: int = 10  # of training, in each turn
    is_tiny: bool = False


# Of the checks: small enough for a CPU, wide enough for a sketch to be one.
CHECKED = ModelSizes(
    vision={
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 28, "patch_size": 14, "projection_dim": 64},
    },
    text={
        **{"hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256},
    },
    rows=6,
    words=20,
)

LLAVA_7B = ModelSizes(
    vision={
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        **{"image_size": 336, "patch_size": 14, "projection_dim": 768},
    },
    text={
        **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096},
    },
    rows=8,
    words=64,
)

# SmolLM2-135M's language model with a small vision tower: a training step that a GPU does faster than it is launched.
SMOL_135M = ModelSizes(
    vision={
        **{"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3},
        **{"image_size": 56, "patch_size": 14, "projection_dim": 192},
    },
    text={
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048},
    },
    rows=32,
    words=64,
)

FULL = Sizes(model=LLAVA_7B, trained=SMOL_135M, dtype=torch.bfloat16)
TINY = Sizes(
    model=CHECKED,
    trained=CHECKED,
    dtype=torch.float32,
    tasks=3,
    r=4,
    batches=2,
    new_tokens=4,
    repeats=1,
    steps=2,
    is_tiny=True,
)
