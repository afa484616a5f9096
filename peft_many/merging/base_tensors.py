"""The base model's tensors that lie beside adapters, embeddings say: a merge keeps them if its adapters agree."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from ..files.adapter import TaskAdapter
from ..files.base_tensors import same_tensor
from ..files.errors import UnmergeableAdapterError


def common_base_tensors(tasks: Sequence[TaskAdapter]) -> dict[str, Tensor]:
    """By name, each as the first task holds it; all others must hold the same."""
    holders: dict[str, TaskAdapter] = {}
    for task in tasks:
        for name, tensor in task.base_tensors.items():
            first = holders.setdefault(name, task)
            if not same_tensor(first.base_tensors[name], tensor):
                raise UnmergeableAdapterError(
                    f"Tensor '{name}' of the base model lies beside {first.source} and {task.source}, and is not the "
                    "same: they were trained on different base models, or each after resizing the vocabulary with "
                    "other random rows (or these were trained). Resize it once, save that model, and train on it."
                )
    return {name: task.base_tensors[name] for name, task in holders.items()}


def check_base_tensors(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse a model whose tensors are others, as far as they are in memory and not quantised."""
    state = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        own = state.get(name)
        if own is None:
            raise UnmergeableAdapterError(
                f"The adapters' tensor '{name}' matches none of {type(model).__name__}: they were trained on another "
                "base model."
            )
        if own.is_meta or not own.is_floating_point() or type(own.data) is not Tensor:
            continue
        if own.shape != tensor.shape:
            raise UnmergeableAdapterError(
                f"'{name}' has the shape {tuple(own.shape)} in this {type(model).__name__}, and {tuple(tensor.shape)} "
                "beside the adapters: they were trained on another base model, or after resizing the vocabulary "
                f"(`model.resize_token_embeddings({len(tensor)})`)."
            )
        if not same_tensor(own.detach().to(tensor.device), tensor):
            raise UnmergeableAdapterError(
                f"'{name}' is not the same in this {type(model).__name__} and beside the adapters: they were trained "
                "on another base model, or its vocabulary was resized with other random rows. A merge that "
                "`merge_adapter_files` makes holds those of the adapters, and `PeftModel.from_pretrained` loads them."
            )


def keys_beside(tensors: Mapping[str, Tensor], layers: Collection[str]) -> dict[str, Tensor]:
    """The tensors by their names on a model where these layers have a LoRA."""
    found = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        found[f"{module}.base_layer.{part}" if module in layers else name] = tensor
    return found
