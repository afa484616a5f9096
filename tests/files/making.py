"""Tiny task adapters and merges for the plugin's tests: random weights, measured on images of one style."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_many import MAnyConfig, collect_statistics, merge_adapter_sequence
from tests import tiny
from tests.places import shared_folder

# Styles of the tasks of a merge: corners of the colour cube.
STYLES = (0, 3, 5)
TEMPERATURE = 0.05

# What the projectors are called.
PROJECTORS = {
    "llava": ["model.multi_modal_projector"],
    "llava_next": ["model.multi_modal_projector"],
    "internvl": ["model.multi_modal_projector"],
    "qwen2_vl": ["model.visual.merger"],
    "qwen2_5_vl": ["model.visual.merger"],
    "qwen3_vl": ["model.visual.merger", "model.visual.deepstack_merger_list.0"],
    "paligemma": ["model.multi_modal_projector"],
    "gemma3": ["model.multi_modal_projector"],
    "idefics3": ["model.connector"],
    "smolvlm": ["model.connector"],
    "mistral3": ["model.multi_modal_projector"],
}
# Families whose patches all come in one row, without a dimension for images or tiles.
FLAT = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3")


def perturb(model: nn.Module, adapter: str, seed: int, scale: float = 0.3) -> None:
    """Random weights for everything that training the adapter would change."""
    generator = torch.Generator().manual_seed(seed)

    def add_noise(module: nn.Module) -> None:
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((scale * noise / max(parameter[0].numel(), 1) ** 0.5).to(parameter.dtype))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer) and adapter in module.lora_B:
                add_noise(module.lora_B[adapter])
            elif isinstance(module, AuxiliaryTrainingWrapper) and adapter in module.modules_to_save:
                add_noise(module.modules_to_save[adapter])


def pictures(family: str, style: int, count: int, seed: int = 0) -> list[Tensor]:
    """Pictures of one style, and of all sizes in turn."""
    sizes = tiny.sizes(family)
    return [
        tiny.random_image(family, 100 * seed + number, style=style, size=sizes[number % len(sizes)])
        for number in range(count)
    ]


def task_batches(model: nn.Module, family: str, style: int, batches: int = 2) -> Iterator[dict[str, Tensor]]:
    """Batches of one task, rows of one, two and no picture, padded left and right."""
    for number in range(batches):
        first, second, third = pictures(family, style, 3, seed=50 + number)
        side = "left" if number % 2 == 0 else "right"
        yield tiny.batch(model, family, [[first], [second, third], []], padding_side=side)


def make_adapter(
    family: str, task: int, projector_modules: list[str] | None = None, dtype: torch.dtype = torch.float32
) -> PeftModel:
    """A model with a measured adapter of one task."""
    base = tiny.build(family, dtype=dtype)
    config = MAnyConfig(r=4, lora_alpha=8, task_name=f"task-{task}", projector_modules=projector_modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task)
        model = get_peft_model(base, config)
    perturb(model, "default", seed=task)
    collect_statistics(model, task_batches(model, family, STYLES[task]), progress=False)
    return model


@functools.cache
def adapter_folder(family: str, task: int, own_projector: bool = True) -> Path:
    """The folder of one task's adapter, made once."""
    folder = shared_folder(f"{family}-{task}-")
    make_adapter(family, task, None if own_projector else []).save_pretrained(str(folder))
    return folder


def merge(family: str, tasks: int = 3, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """A fresh merge of the first tasks."""
    folders = [adapter_folder(family, task) for task in range(tasks)]
    base = tiny.build(family, dtype=dtype)
    options = {"temperature": TEMPERATURE, "progress": False, **options}
    return merge_adapter_sequence(base, folders, **options)  # type: ignore[arg-type]


@functools.cache
def shared_merge(family: str) -> PeftModel:
    """A merge of three tasks that tests only read."""
    return merge(family)


@functools.cache
def shared_base(family: str) -> PreTrainedModel:
    """A base model that tests only read."""
    return tiny.build(family)
