"""From images, questions and answers to batches: the model's own processor and chat template, answers as labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

IGNORED = -100  # the label that transformers' losses leave out

# What LLaVA-1.5 was trained with (`conv_vicuna_v1` in `llava/conversation.py` of github.com/haotian-liu/LLaVA), and
# MCITlib trains and tests with; the chat template of llava-hf/llava-1.5-7b-hf does not add it by itself.
SYSTEM_PROMPTS = {
    "llava": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
}


class Collator:
    """Makes batches with a model's processor.

    Args:
        processor (`transformers.ProcessorMixin`): The model's.
        model_type (`str`): `config.model_type`, which a system prompt may belong to.
        pad_images (`bool`): Pad images to squares where the processor would crop them.
        max_length (`int`): Training rows are cut at this many tokens, image included.
    """

    def __init__(self, processor: Any, model_type: str, pad_images: bool = True, max_length: int = 2048) -> None:
        self.processor = processor
        self.system = SYSTEM_PROMPTS.get(model_type)
        self.pad_images = pad_images and bool(getattr(processor.image_processor, "do_center_crop", False))
        self.max_length = max_length

    def training(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Questions with their answers; only the answer and the end of the text are labels.

        Raises:
            ValueError: A row's answer lies beyond `max_length`.
        """
        prompts = [self._prompt(row) for row in rows]
        texts = [self._with_answer(prompt, row["answer"]) for prompt, row in zip(prompts, rows)]
        batch = self._process(rows, texts, "right")
        labels = batch["input_ids"].clone()
        for row, prompt, text, label, mask in zip(rows, prompts, texts, labels, batch["attention_mask"]):
            length = int(mask.sum())
            start = length - self._answer_length(prompt, text)
            if start >= self.max_length:
                raise ValueError(
                    f"Training example {row['id']!r} has its answer behind {start} tokens, but only "
                    f"{self.max_length} are kept; raise `--max-length`."
                )
            label[:start] = IGNORED
            label[length:] = IGNORED
        batch["labels"] = labels
        return {
            name: tensor[:, : self.max_length] if name in ("input_ids", "attention_mask", "labels") else tensor
            for name, tensor in batch.items()
        }

    def questions(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Questions alone, for `generate`."""
        return self._process(rows, [self._prompt(row) for row in rows], "left")

    def messages(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The conversation before the answer: an image and a question about it. Other rows, other conversations."""
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]

    def pictures(self, row: dict[str, Any]) -> list[Image.Image]:
        """The images of the conversation, in order."""
        return [row["image"]]

    def _prompt(self, row: dict[str, Any]) -> str:
        messages = self.messages(row)
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        prompt: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return prompt

    def _with_answer(self, prompt: str, answer: str) -> str:
        space = "" if prompt[-1:].isspace() else " "
        return f"{prompt}{space}{answer}{self.processor.tokenizer.eos_token}"

    def _answer_length(self, prompt: str, text: str) -> int:
        """How many tokens of `text` come after `prompt`. Before the image's mark is expanded, which is before both."""
        before, whole = (self.processor.tokenizer(part)["input_ids"] for part in (prompt, text))
        if whole[: len(before)] != before:
            raise ValueError(
                f"The tokenizer splits the end of the prompt {prompt[-20:]!r} differently when an answer follows, so "
                "that the answer's tokens cannot be told from the question's."
            )
        return len(whole) - len(before)

    def _process(self, rows: Sequence[dict[str, Any]], texts: list[str], side: str) -> dict[str, Tensor]:
        pictures = [[self._padded(picture) for picture in self.pictures(row)] for row in rows]
        images: Any = pictures
        if all(len(own) < 2 for own in pictures):  # every processor takes them as they come then
            images = [own[0] for own in pictures if own] or None
        batch = self.processor(images=images, text=texts, padding=True, padding_side=side, return_tensors="pt")
        return dict(batch)

    def _padded(self, image: Image.Image) -> Image.Image:
        """The image in the middle of a square of the processor's mean colour, as `--image_aspect_ratio pad` does."""
        if not self.pad_images or image.width == image.height:
            return image
        colour = tuple(int(255 * mean) for mean in self.processor.image_processor.image_mean)
        side = max(image.size)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square
