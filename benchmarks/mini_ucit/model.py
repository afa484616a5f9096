"""The benchmark's tiny models: their tokenizer, architectures, the checkpoint that lies beside them, batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
)

from .drawing import CELL, GRID, SIZE
from .world import VOCABULARY, Example

IMAGE_TOKENS = GRID * GRID  # one for each cell of a scene
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
_QWEN_PATCH = CELL // 2  # Qwen2-VL merges two by two patches


@dataclass(frozen=True)
class TinyModel:
    """A tiny vision-language model: its architecture, how it takes pictures, and where its weights are.

    Args:
        name (`str`): What the benchmark calls it.
        about (`str`): One line for people.
        configure (`Callable`): From the tokenizer to the configuration.
        picture_inputs (`Callable`): From uint8 images (SIZE, SIZE, 3) to the model's arguments.
        checkpoint (`Path`, *optional*): The pre-trained weights, if the repository has them.
        bfloat16 (`bool`): Whether pre-training multiplies in bfloat16, which pays from some width on.
        learning_rate (`float`): Of pre-training, at its highest; halved for twice the width.
    """

    name: str
    about: str
    configure: Callable[[PreTrainedTokenizerFast], PreTrainedConfig]
    picture_inputs: Callable[[Sequence[np.ndarray]], dict[str, torch.Tensor]]
    checkpoint: Path | None = None
    bfloat16: bool = False
    learning_rate: float = 2e-3

    def build(self) -> PreTrainedModel:
        """The model with random weights, in training mode."""
        return AutoModelForImageTextToText.from_config(self.configure(build_tokenizer()))

    def load(self, folder: Path | None = None) -> PreTrainedModel:
        """The pre-trained model, in float32 (stored in float16 to be small), in evaluation mode."""
        where = folder or self.checkpoint
        if where is None:
            raise ValueError(f"The weights of '{self.name}' are not in the repository; name their folder.")
        return AutoModelForImageTextToText.from_pretrained(where, dtype=torch.float32).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words over the closed vocabulary."""
    words = [*_SPECIAL.values(), "<image>", *VOCABULARY]
    table = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=["<image>"], **_SPECIAL)


def _text_options(tokenizer: PreTrainedTokenizerFast, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _llava(tokenizer: PreTrainedTokenizerFast, width: int) -> LlavaConfig:
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=CELL,
        hidden_size=width * 3 // 4,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=width * 3 // 4,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text_options(tokenizer, width)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _qwen2_vl(tokenizer: PreTrainedTokenizerFast, width: int) -> Qwen2VLConfig:
    vision = {
        "depth": 3,
        "embed_dim": width * 3 // 4,
        "hidden_size": width,
        "mlp_ratio": 2,
        "num_heads": 4,
        "patch_size": _QWEN_PATCH,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
    }
    sections = [width // 16, width // 32, width // 32]  # of the rotary frequencies: time, height, width
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    return Qwen2VLConfig(
        vision_config=vision,
        text_config={**_text_options(tokenizer, width), "rope_parameters": rope},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )


def _pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Float32 (batch, 3, SIZE, SIZE) in [-1, 1]."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return batch / 127.5 - 1


def _as_pixels(images: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    return {"pixel_values": _pixels(images)}


def _as_patches(images: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Qwen2-VL's flat patches: (all patches, 3 * patch²), those that are merged next to one another."""
    side, patch = SIZE // _QWEN_PATCH, _QWEN_PATCH
    blocks = _pixels(images).reshape(-1, 3, side // 2, 2, patch, side // 2, 2, patch)
    return {
        "pixel_values": blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 3 * patch * patch),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(images)),
    }


MODELS = {
    model.name: model
    for model in (
        TinyModel(
            "llava",
            "a LLaVA with a million parameters, 128 wide",
            partial(_llava, width=128),
            _as_pixels,
            Path(__file__).parent / "checkpoints" / "llava",
        ),
        TinyModel(
            "llava-wide",
            "a LLaVA twice as wide, 256",
            partial(_llava, width=256),
            _as_pixels,
            bfloat16=True,
            learning_rate=1e-3,
        ),
        TinyModel("qwen2-vl", "a Qwen2-VL, 128 wide", partial(_qwen2_vl, width=128), _as_patches),
    )
}


class Collator:
    """Makes batches: `<bos> <image>... question answer <eos> question answer <eos> ...`, padded on the right.

    Examples without an image have no `<image>`, and may stand among others. Labels are -100 except on the answers and
    the `<eos>` behind each. With `prompts_only` a batch ends after the first question, is padded on the left as
    `generate` wants it, and has no labels.
    """

    def __init__(self, model: TinyModel, prompts_only: bool = False) -> None:
        self.model = model
        self.tokenizer = build_tokenizer()
        self.prompts_only = prompts_only
        self.image = self.tokenizer.convert_tokens_to_ids("<image>")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.convert_tokens_to_ids(text.split())

    def _one(self, example: Example) -> tuple[list[int], list[int]]:
        """Returns token ids and labels of one example, of equal length."""
        ids = [self.tokenizer.bos_token_id, *[self.image] * (0 if example.image is None else IMAGE_TOKENS)]
        if self.prompts_only:
            ids += self._ids(example.question)
            return ids, [-100] * len(ids)
        labels = [-100] * len(ids)
        for question, answer in example.turns:
            asked, answered = self._ids(question), [*self._ids(answer), self.tokenizer.eos_token_id]
            ids += asked + answered
            labels += [-100] * len(asked) + answered
        return ids, labels

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Returns ids, mask and labels, int64 (batch, length), and the pictures, if any, as the model takes them."""
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
        batch = {"input_ids": input_ids, "attention_mask": mask}
        images = [example.image for example in examples if example.image is not None]
        if images:
            batch |= self.model.picture_inputs(images)
        if "image_grid_thw" in batch:
            batch["mm_token_type_ids"] = (input_ids == self.image).long()
        return batch if self.prompts_only else {**batch, "labels": labels}
