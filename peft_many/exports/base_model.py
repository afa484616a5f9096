"""A base model that is given an adapter's deltas, or its projector, for good."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..files.adapter import Adapter
from ..files.errors import UnmergeableAdapterError
from ..merging.base_model import check_fits_model
from ..tuner.config import MAnyConfig
from .export import as_lora, read_pairs


def fold(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """Add an adapter's deltas to the model's weights, in place; of a merge with a gate, the merged LoRA."""
    pairs = read_pairs(adapter)
    _take_base_tensors(model, adapter)
    _untie(model, pairs)
    config, tensors = as_lora(adapter, pairs, MAnyConfig, projector_modules=[])
    check_fits_model(config, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, model)
    peft_model = get_peft_model(model, config)
    set_peft_model_state_dict(peft_model, tensors)
    plain: PreTrainedModel = peft_model.merge_and_unload()
    return plain


def _take_base_tensors(model: PreTrainedModel, adapter: Adapter) -> None:
    """Give the model the embeddings that lie beside its adapter, and with them a vocabulary of their size."""
    tensors = {name: tensor for task in adapter.tasks for name, tensor in task.base_tensors.items()}
    rows = next((len(tensor) for tensor in tensors.values()), 0)
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding) and rows not in (0, embeddings.num_embeddings):
        model.resize_token_embeddings(rows, mean_resizing=False)
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise UnmergeableAdapterError(
                f"The tensor '{name}' beside the adapter does not fit this {type(model).__name__}: it was trained on "
                "another base model."
            )
        own[name].data.copy_(tensor)


def _untie(model: PreTrainedModel, layers: Iterable[str]) -> None:
    """Give an adapted output head weights of its own, or its delta would be added to the embeddings too."""
    embeddings: Any = model.get_input_embeddings()
    for layer in layers:
        module: Any = dict(model.named_modules()).get(layer)
        if getattr(module, "weight", None) is embeddings.weight:
            module.weight = nn.Parameter(module.weight.detach().clone())
            model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def put_projector(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Replace the weights of the model's projector by those of the tensors whose names are within it."""
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    try:
        model.get_submodule(name).load_state_dict(own)
    except (AttributeError, RuntimeError) as error:
        raise UnmergeableAdapterError(
            f"The adapter's projector '{name}' does not fit this {type(model).__name__}: it was trained on another "
            f"base model. ({' '.join(str(error).split())})"
        ) from None
