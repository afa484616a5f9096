"""The demo's tiny LLaVA: its tokenizer, its configuration, the checkpoint that ships with the package, its batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from .drawing import CELL, GRID, SIZE
from .tasks import VOCABULARY, Example

CHECKPOINT = Path(__file__).parent / "checkpoint"
IMAGE_TOKENS = GRID * GRID  # one per patch; a patch is one cell of a scene
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of whole words over the demo's closed vocabulary."""
    words = [*_SPECIAL.values(), "<image>", *VOCABULARY]
    table = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=["<image>"], **_SPECIAL)


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """Returns the configuration of a LLaVA with about a million parameters."""
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=CELL,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def load_tokenizer(folder: Path = CHECKPOINT) -> PreTrainedTokenizerFast:
    """Reads the tokenizer that ships with the checkpoint."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def load_model(folder: Path = CHECKPOINT) -> LlavaForConditionalGeneration:
    """Reads the pre-trained model, in fp32 (stored in fp16 to be small), in evaluation mode."""
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Turns uint8 images (SIZE, SIZE, 3) into the tower's input: float32 (batch, 3, SIZE, SIZE) in [-1, 1]."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return batch / 127.5 - 1


class Collator:
    """Makes batches: `<bos> <image>... question answer <eos> question answer <eos> ...`, padded on the right.

    Labels are -100 except on the answers and the `<eos>` behind each. With `prompts_only` a batch ends after the first
    question, is padded on the left as `generate` wants it, and has no labels.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompts_only: bool = False) -> None:
        self.tokenizer = tokenizer
        self.prompts_only = prompts_only
        image = tokenizer.convert_tokens_to_ids("<image>")
        self.head = [tokenizer.bos_token_id, *[image] * IMAGE_TOKENS]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.convert_tokens_to_ids(text.split())

    def _one(self, example: Example) -> tuple[list[int], list[int]]:
        """Returns token ids and labels of one example, of equal length."""
        if self.prompts_only:
            ids = self.head + self._ids(example.question)
            return ids, [-100] * len(ids)
        ids, labels = list(self.head), [-100] * len(self.head)
        for question, answer in example.turns:
            asked, answered = self._ids(question), [*self._ids(answer), self.tokenizer.eos_token_id]
            ids += asked + answered
            labels += [-100] * len(asked) + answered
        return ids, labels

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Returns ids, mask and labels, int64 (batch, length), and pixel_values, float32 (batch, 3, SIZE, SIZE)."""
        rows = [self._one(example) for example in examples]
        length = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), -100)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for row, (ids, targets) in enumerate(rows):
            span = slice(length - len(ids), length) if self.prompts_only else slice(0, len(ids))
            input_ids[row, span] = torch.tensor(ids)
            labels[row, span] = torch.tensor(targets)
            mask[row, span] = 1
        batch = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "pixel_values": pixels([example.image for example in examples]),
        }
        return batch if self.prompts_only else {**batch, "labels": labels}
