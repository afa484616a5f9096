"""Tiny task adapters with everything a test needs to compute their merge by itself: true deltas and layer inputs."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_many import MAnyConfig, collect_statistics
from peft_many.algebra.covariance import Covariance
from peft_many.files.statistics import TaskStatistics
from tests import tiny

WEIGHTS = "adapter_model.safetensors"
STATISTICS = "adapter_statistics.safetensors"
TEXT_MODELS = ("llama", "gpt2")
PROJECTOR = "model.multi_modal_projector"


@dataclass(frozen=True)
class Made:
    """An adapter folder, and what is true of it.

    Args:
        folder (`Path`): Where it was saved.
        deltas (`dict`): The effective weight change of every adapted layer, `(out, in)`, float64.
        inputs (`dict`): The input rows of every linear layer of the language model, `(tokens, in)`, float64.
    """

    folder: Path
    deltas: dict[str, Tensor]
    inputs: dict[str, Tensor]


def base(family: str) -> PreTrainedModel:
    """The base model that all adapters of a family were trained on."""
    return tiny.build_text(family) if family in TEXT_MODELS else tiny.build(family)


def batches(model: nn.Module, family: str, seed: int, rows: int = 4, images: bool = True) -> list[dict[str, Tensor]]:
    """Two batches that look alike within a task (its seed) and differ between tasks; the prompts need padding."""
    prompts = [[tiny.TEXT_TOKENS[(13 * seed + 7 * row + p) % 97] for p in range(3 + row % 3)] for row in range(rows)]
    if family == "gpt2":
        return [{"input_ids": torch.tensor([prompt])} for prompt in prompts]
    if family in TEXT_MODELS:
        family, images = "llava", False  # whose batches of text fit any model
    shown = [[tiny.random_image(family, row, style=seed % 8)] if images else [] for row in range(rows)]
    half = rows // 2 or 1
    parts = [slice(0, half), slice(half, rows)] if rows > 1 else [slice(0, 1)]
    return [tiny.batch(model, family, shown[part], prompts[part]) for part in parts]


def make(
    folder: Path,
    family: str = "llava",
    seed: int = 0,
    *,
    kind: type[LoraConfig] = MAnyConfig,
    rows: int = 4,
    images: bool = True,
    measure: Sequence[str] | str | None = None,
    energy: float = 1.0,
    **options: Any,
) -> Made:
    """Train (at random) an adapter, measure it and save it, by default with whole covariances."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base(family), kind(**{"r": 4, "lora_alpha": 8, **options}))
    scatter(model, seed)
    deltas = effective_deltas(model, base(family))
    loader = batches(model, family, seed, rows, images)
    with recorded(model) as inputs:
        collect_statistics(model, loader, also_measure=measure, energy=energy, progress=False)
    model.save_pretrained(folder)
    return Made(folder, deltas, {name: torch.cat(parts) for name, parts in inputs.items()})


def make_loha(folder: Path, seed: int = 0) -> Made:
    """A measured adapter of another PEFT method than LoRA, on the tiny Llama; its inputs are not kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base("llama"), LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)).eval()
    collect_statistics(model, batches(model, "llama", seed), energy=1.0, progress=False)
    model.save_pretrained(folder)
    layers = {name: module for name, module in model.get_base_model().named_modules() if name.endswith("q_proj")}
    return Made(folder, {name: layer.get_delta_weight("default").double() for name, layer in layers.items()}, {})


def covariances(task: TaskStatistics) -> dict[str, Covariance]:
    """By layer."""
    return {layer: task.inputs[key].covariance for layer, key in task.input_of.items()}


def scatter(model: nn.Module, seed: int) -> None:
    """Random values for whatever training would change."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for trained in [*module.lora_A.parameters(), *module.lora_B.parameters()]:
                    trained.copy_(0.2 * torch.randn(trained.shape, generator=generator))
            elif isinstance(module, AuxiliaryTrainingWrapper):
                for trained in module.modules_to_save.parameters():
                    trained.add_(0.2 * torch.randn(trained.shape, generator=generator))


def effective_deltas(model: PeftModel, before: nn.Module) -> dict[str, Tensor]:
    """What the adapter adds to each weight, found by merging it in float64: whatever the config means by it."""
    adapted = [name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)]
    merged = copy.deepcopy(model).double().merge_and_unload()
    deltas = {}
    for name in adapted:
        layer = merged.get_submodule(name)
        delta = layer.weight.detach() - before.get_submodule(name).weight.detach().double()
        deltas[name] = delta.T if isinstance(layer, Conv1D) else delta
    return deltas


@contextmanager
def recorded(model: PeftModel) -> Iterator[dict[str, list[Tensor]]]:
    """The rows that arrive at each linear layer of the language model while the block runs, padding left out."""
    inner = model.get_base_model()
    rows: dict[str, list[Tensor]] = {}
    masks: list[Tensor] = []

    def note_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        masks[:] = [torch.ones_like(kwargs["input_ids"]) if mask is None else mask]

    def note_input(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.setdefault(name, []).append(args[0][masks[0].bool()].double())

    handles = [inner.register_forward_pre_hook(note_mask, with_kwargs=True)]
    adapted = tuple(f"{name}." for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer))
    for name, module in inner.named_modules():
        linear = isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer))
        if (
            linear
            and not name.startswith(adapted)
            and not name.endswith("lm_head")
            and not any(part in name for part in ("vision", "visual", "projector"))
        ):
            handles.append(module.register_forward_pre_hook(functools.partial(note_input, name)))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def reference(tasks: Sequence[Made | None], layer: str, ridge: float, weights: Sequence[float]) -> Tensor:
    """`(Σ_t w_t ΔW_t C_t)(Σ_t w_t C_t)⁻¹` straight from its definition, dense and in float64, `(out, in)`."""
    shape = next(task.deltas[layer].shape for task in tasks if task and layer in task.deltas)
    moments = torch.zeros(shape, dtype=torch.float64)
    scatter_sum = torch.zeros(shape[1], shape[1], dtype=torch.float64)
    for task, weight in zip(tasks, weights, strict=True):
        if task is None:
            continue
        x = task.inputs[layer]
        second_moment = x.T @ x / len(x)
        second_moment += ridge * second_moment.diagonal().mean() * torch.eye(shape[1], dtype=torch.float64)
        scatter_sum += weight * second_moment
        if layer in task.deltas:
            moments += weight * task.deltas[layer] @ second_moment
    return torch.linalg.solve(scatter_sum, moments.T).T


def merged_deltas(folder: Path) -> dict[str, Tensor]:
    """`B A` of every layer in a merge's file, float64."""
    tensors = load_file(folder / WEIGHTS)
    halves = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    return {
        name.removeprefix("base_model.model."): tensors[f"{name}.lora_B.weight"].double()
        @ tensors[f"{name}.lora_A.weight"].double()
        for name in halves
    }


def distance(found: Tensor, expected: Tensor) -> float:
    """The relative error in the Frobenius norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def logits(model: nn.Module, family: str, seed: int = 50) -> Tensor:
    """The model's outputs on inputs of several kinds, float32."""
    with torch.no_grad():
        outputs = [model(**batch).logits.float().flatten() for batch in batches(model, family, seed)]
    return torch.cat(outputs)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def but_operations(folder: Path) -> dict[str, object]:
    """What is in a merge's files, without the record of what was done to make it; of the card, all but that."""
    found: dict[str, object] = dict(files(folder))
    config = json.loads(found["adapter_config.json"])
    assert config["merge"].pop("operations")
    above, record, below = found["README.md"].decode().partition("What was done")
    assert record
    return {**found, "adapter_config.json": config, "README.md": (above, below.partition("```python")[2])}


def state_digest(model: nn.Module) -> dict[str, str]:
    """A hash of every tensor and the class and training mode of every module: what must not change."""
    found = {name: f"{type(module).__name__} {module.training}" for name, module in model.named_modules()}
    tensors: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        content = tensor.detach().contiguous().view(torch.uint8) if tensor.dim() else tensor.detach().reshape(1)
        digest = hashlib.sha256(content.numpy().tobytes()).hexdigest()
        found[f"{name} (tensor)"] = f"{tensor.dtype} {tensor.requires_grad} {digest}"
    found["own attributes"] = ", ".join(sorted(key for module in model.modules() for key in vars(module)))
    return found
