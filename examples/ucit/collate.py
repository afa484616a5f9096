"""From images, questions and answers to batches: the model's own processor and chat template, answers as labels."""

from __future__ import annotations

from typing import Any

from peft_many.data.batches import IGNORED, ChatCollator

__all__ = ["IGNORED", "SYSTEM_PROMPTS", "Collator"]

# What LLaVA-1.5 was trained with (`conv_vicuna_v1` in `llava/conversation.py` of github.com/haotian-liu/LLaVA), and
# MCITlib trains and tests with; the chat template of llava-hf/llava-1.5-7b-hf does not add it by itself.
SYSTEM_PROMPTS = {
    "llava": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
}


class Collator(ChatCollator):
    """Makes batches of questions about one image each, with a model's processor.

    Args:
        processor (`transformers.ProcessorMixin`): The model's.
        model_type (`str`): `config.model_type`, which a system prompt may belong to.
        pad_images (`bool`): Pad images to squares where the processor would crop them.
        max_length (`int`): Training rows are cut at this many tokens, image included.
    """

    def __init__(self, processor: Any, model_type: str, pad_images: bool = True, max_length: int = 2048) -> None:
        super().__init__(processor, SYSTEM_PROMPTS.get(model_type), pad_images, max_length)
