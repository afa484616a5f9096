"""What the training examples share: a file of questions about images, and batches of them for a model's processor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image


class Questions(torch.utils.data.Dataset):
    """The rows of a JSON-lines file, `{"image": "a.png", "question": "…", "answer": "…"}`; paths begin at the file."""

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        self.rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {**row, "image": Image.open(self.folder / row["image"]).convert("RGB")}


class Collator:
    """Makes batches by the model's chat template; only the answers are labels."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row["image"] for row in rows]
        prompts = [prompt(self.processor, row["question"]) for row in rows]
        end = self.processor.tokenizer.eos_token
        texts = [
            f"{asked}{'' if asked[-1].isspace() else ' '}{row['answer']}{end}" for asked, row in zip(prompts, rows)
        ]
        options = {"images": images, "padding": True, "padding_side": "right", "return_tensors": "pt"}
        batch = self.processor(text=texts, **options)
        asked = self.processor(text=prompts, **options)["attention_mask"].sum(1)
        places = torch.arange(batch["input_ids"].shape[1])
        answered = batch["attention_mask"].bool() & (places >= asked[:, None])
        return {**batch, "labels": batch["input_ids"].where(answered, -100)}


def prompt(processor: Any, question: str) -> str:
    """One question about one image, as the model's chat template puts it."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
