"""From conversations to batches, by the model's own processor and chat template, as the example scripts make them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from examples.ucit.collate import Collator

from .messages import Example


class Rows(Dataset[dict[str, Any]]):
    """Examples with their images opened when they are wanted."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        images = [_opened(path) for path in example.images]
        return {"id": index, "messages": list(example.messages), "images": images, "answer": example.answer}


class ChatCollator(Collator):
    """Whole conversations with any number of images; the last answer is what is learnt."""

    def messages(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        return list(row["messages"])

    def pictures(self, row: dict[str, Any]) -> list[Image.Image]:
        return row["images"]


def training_batches(examples: Sequence[Example], collator: ChatCollator, size: int) -> Iterator[dict[str, Tensor]]:
    """Batches with labels, in order; the last one may be smaller."""
    rows = Rows(examples)
    for start in range(0, len(rows), size):
        yield collator.training([rows[i] for i in range(start, min(start + size, len(rows)))])


def question_batches(examples: Sequence[Example], collator: ChatCollator, size: int) -> Iterator[dict[str, Tensor]]:
    """Batches that end where the answer begins, in order."""
    rows = Rows(examples)
    for start in range(0, len(rows), size):
        yield collator.questions([rows[i] for i in range(start, min(start + size, len(rows)))])


def _opened(path: Any) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"The image '{path}' cannot be read: {error}.") from error
