"""From conversations to batches: the model's own processor and chat template, answers as labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from transformers import BatchFeature

from .conversations import Example
from .reading import opened

IGNORED = -100  # the label that transformers' losses leave out
_OF_TOKENS = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")
_NO_IMAGES = "There are images, but the model's processor takes none: it is a model of text."


class Rows(Dataset[dict[str, Any]]):
    """Examples with their images opened when they are wanted."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        images = [opened(picture) for picture in example.images]
        return {"id": index, "messages": list(example.messages), "images": images, "answer": example.answer}


class ChatCollator:
    """Makes batches of conversations with any number of images; the last answer is what is learnt.

    Args:
        processor (`transformers.ProcessorMixin`): The model's; a tokenizer, where no images are.
        system (`str`, *optional*): What is said before conversations that have no system message of their own.
        pad_images (`bool`, defaults to `False`): Pad images to squares where the processor would crop them.
        max_length (`int`, *optional*): Training rows are cut at this many tokens, image included.

    Raises:
        ValueError: The processor has no chat template.
    """

    def __init__(
        self, processor: Any, system: str | None = None, pad_images: bool = False, max_length: int | None = None
    ) -> None:
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f"This {type(processor).__name__} has no chat template to put conversations into; pass a processor "
                "whose `chat_template` is the one that the adapter was trained with."
            )
        self.processor, self.system, self.max_length = processor, system, max_length
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.takes_images = hasattr(processor, "image_processor")
        self.pad_images = pad_images and bool(
            getattr(getattr(processor, "image_processor", None), "do_center_crop", False)
        )

    def check(self, examples: Sequence[Example]) -> None:
        """Find out before a model is loaded that it cannot be given these examples.

        Raises:
            ValueError: There are images, and the model is one of text.
        """
        if not self.takes_images and any(example.images for example in examples):
            raise ValueError(_NO_IMAGES)

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
            if self.max_length is not None and start >= self.max_length:
                raise ValueError(
                    f"Training example {row['id']!r} has its answer behind {start} tokens, but only "
                    f"{self.max_length} are kept; raise `--max-length`."
                )
            label[:start] = IGNORED
            label[length:] = IGNORED
        batch["labels"] = labels
        return {name: tensor[:, : self.max_length] if name in _OF_TOKENS else tensor for name, tensor in batch.items()}

    def questions(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Questions alone, for `generate`."""
        return self._process(rows, [self._prompt(row) for row in rows], "left")

    def _prompt(self, row: dict[str, Any]) -> str:
        messages = row["messages"]
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": [{"type": "text", "text": self.system}]}, *messages]
        if not self.takes_images:
            messages = [_in_words(message) for message in messages]
        prompt: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return prompt

    def _with_answer(self, prompt: str, answer: str) -> str:
        space = "" if prompt[-1:].isspace() else " "
        end = self.tokenizer.eos_token or ""
        # Data for trainers that add no end has it already.
        return f"{prompt}{space}{answer.removesuffix(end)}{end}"

    def _answer_length(self, prompt: str, text: str) -> int:
        """How many tokens of `text` come after `prompt`. Before the image's mark is expanded, which is before both."""
        before, whole = (self.tokenizer(part)["input_ids"] for part in (prompt, text))
        if whole[: len(before)] != before:
            raise ValueError(
                f"The tokenizer splits the end of the prompt {prompt[-20:]!r} differently when an answer follows, so "
                "that the answer's tokens cannot be told from the question's."
            )
        return len(whole) - len(before)

    def _process(self, rows: Sequence[dict[str, Any]], texts: list[str], side: str) -> dict[str, Tensor]:
        options: dict[str, Any] = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        if self.takes_images:
            pictures = [[self._padded(picture) for picture in row["images"]] for row in rows]
            options["images"] = pictures
            if all(len(own) < 2 for own in pictures):  # every processor takes them as they come then
                options["images"] = [own[0] for own in pictures if own] or None
        return dict(self.processor(text=texts, **options))

    def _padded(self, image: Any) -> Any:
        """The image in the middle of a square of the processor's mean colour, as `--image_aspect_ratio pad` does."""
        if not self.pad_images or image.width == image.height:
            return image
        from PIL import Image

        colour = tuple(int(255 * mean) for mean in self.processor.image_processor.image_mean)
        side = max(image.size)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def batches(
    examples: Sequence[Example], make: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]], size: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of `size` examples in their order, the last one perhaps smaller, made by a method of a collator."""
    rows = Rows(examples)
    for start in range(0, len(rows), size):
        yield make([rows[i] for i in range(start, min(start + size, len(rows)))])


def for_model(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A batch where a model is, with numbers in the dtype of its weights, as not all models see to that themselves."""
    return dict(BatchFeature(batch).to(model.device, model.dtype))


def _in_words(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates of text models take it, with its content as a string."""
    images = [part for part in message["content"] if part["type"] != "text"]
    if images:
        raise ValueError(_NO_IMAGES)
    return {**message, "content": " ".join(part["text"] for part in message["content"])}
