"""Models with random weights, batches for them, and adapters as training would leave them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from peft_many import MAnyConfig, collect_statistics

from .sizes import IMAGE, PAD, ModelSizes

Batch = dict[str, Tensor]


def build(sizes: ModelSizes, device: torch.device, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A base model, made where it is to be; each kind of device draws other weights."""
    torch.manual_seed(0)
    with device:
        return AutoModelForImageTextToText.from_config(sizes.config(), dtype=dtype, **options).eval()


def copied(original: nn.Module, copy: nn.Module) -> nn.Module:
    """A model with the weights of another. `to(dtype)` of that one would round what rotary embeddings keep."""
    copy.load_state_dict(original.state_dict())
    return copy


def batch(sizes: ModelSizes, device: torch.device, dtype: torch.dtype, task: int, seed: int = 0) -> Batch:
    """Rows of an image and words, without padding; a task's images have a mean of their own."""
    generator = torch.Generator().manual_seed(1000 * task + seed)
    vocabulary, side = sizes.text["vocab_size"], sizes.vision["image_size"]
    ids = torch.randint(10, vocabulary, (sizes.rows, sizes.tokens), generator=generator)
    ids[:, 1 : 1 + sizes.image_tokens] = IMAGE
    mean = torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(task))
    pixels = torch.randn(sizes.rows, 3, side, side, generator=generator) + 2 * mean
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(dtype)}
    return {name: tensor.to(device) for name, tensor in made.items()}


def with_labels(given: Batch) -> Batch:
    """The batch as for training."""
    return {**given, "labels": given["input_ids"].masked_fill(given["input_ids"] == IMAGE, -100)}


def mixed_batch(sizes: ModelSizes, device: torch.device, dtype: torch.dtype, tasks: int) -> Batch:
    """A row of each task, padded on the left to different lengths, and one that has no image."""
    rows = [batch(sizes, device, dtype, task, seed=99) for task in range(tasks)]
    ids = torch.cat([one["input_ids"][:1] for one in [*rows, rows[0]]])
    mask = torch.ones_like(ids)
    ids[-1][ids[-1] == IMAGE] = 11
    for row in range(1, tasks):  # the image follows the padding
        ids[row], mask[row, :row] = ids[row].roll(row), 0
        ids[row, :row] = PAD
    pixels = torch.cat([one["pixel_values"][:1] for one in rows])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def one_by_one(given: Batch) -> Iterator[Batch]:
    """The rows of a mixed batch as batches of their own, without padding."""
    for row, (ids, mask) in enumerate(zip(given["input_ids"], given["attention_mask"])):
        alone = {name: value[None, mask.bool()] for name, value in (("input_ids", ids), ("attention_mask", mask))}
        images = {"pixel_values": given["pixel_values"][row : row + 1]} if (ids == IMAGE).any() else {}
        yield alone | images


def adapted(base: nn.Module, task: int, r: int, strength: float) -> PeftModel:
    """An adapter with all that training would have changed drawn at random, the same on each device."""
    torch.manual_seed(task + 1)
    model = get_peft_model(base, MAnyConfig(r=r, lora_alpha=2 * r, task_name=f"task_{task}"))
    generator = torch.Generator().manual_seed(task + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
            if "lora_A" in name:
                parameter.copy_(drawn * parameter.shape[1] ** -0.5)
            elif "lora_B" in name:
                parameter.copy_(drawn * strength)
            else:  # the projector's copy
                parameter.add_(drawn * 0.2 * parameter.abs().mean())
    return model.eval()


def save_adapter(base: nn.Module, folder: Path, task: int, batches: list[Batch], r: int, strength: float) -> nn.Module:
    """Make, measure and save an adapter; the base model as it was."""
    model = adapted(base, task, r, strength)
    collect_statistics(model, batches, max_samples=None, progress=False)
    model.save_pretrained(folder)
    return model.unload()
