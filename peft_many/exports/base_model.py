"""The base model of an adapter: loaded, given the adapter's deltas for good, and saved with its tokenizer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from ..files.adapter import Adapter
from ..files.errors import UnmergeableAdapterError
from ..hub.sources import HubArguments, first_line
from ..merging.base_model import check_fits_model
from ..tuner.config import MAnyConfig
from .export import as_lora, largest_rank, read_pairs

# What tokenizers, processors and generation are made of; no weights and no code.
_BESIDES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*preprocessor_config.json",
    "processor_config.json",
    "chat_template.*",
    "generation_config.json",
)


@dataclass(frozen=True)
class BaseModel:
    """Which model an adapter belongs to, and how to download it."""

    name: str  # a folder or Hub id
    revision: str | None
    hub: HubArguments = field(repr=False)

    @classmethod
    def of(cls, given: str | os.PathLike[str] | None, adapter: Adapter, hub: HubArguments) -> BaseModel:
        """The one given (`"me/model@revision"` too), or the one that the adapter's config names."""
        if not isinstance(given, (str, os.PathLike, type(None))):
            raise ValueError(f"`base_model` must be a folder or a Hub id, but it is a {type(given).__name__}.")
        if given is None:
            name, revision = adapter.config.base_model_name_or_path, adapter.config.revision
        elif Path(given).expanduser().is_dir():
            name, revision = str(Path(given).expanduser()), None
        else:
            name, _, at = str(given).partition("@")
            revision = at or None
        if not name:
            raise ValueError("The adapter does not say which base model it is of; pass `base_model`.")
        return cls(name, revision, hub)

    def load(self) -> PreTrainedModel:
        """The model, in the dtype that it is stored in. No code but transformers' own is run."""
        try:
            config = AutoConfig.from_pretrained(self.name, revision=self.revision, **self.hub)
            kind = model_class(config, self.name)
            model: PreTrainedModel = kind.from_pretrained(self.name, revision=self.revision, dtype="auto", **self.hub)
        except OSError as error:  # which those of the Hub are too
            raise FileNotFoundError(f"The base model '{self.name}' cannot be loaded: {first_line(error)}") from None
        return model.eval()

    def copy_tokenizer(self, folder: Path) -> list[str]:
        """Copy the model's tokenizer and processor files; what to note if there are none."""
        source = Path(self.name)
        missing = ["No tokenizer or processor was found beside the base model, so none is here."]
        if not source.is_dir():
            try:
                source = Path(
                    snapshot_download(self.name, revision=self.revision, allow_patterns=list(_BESIDES), **self.hub)
                )
            except LocalEntryNotFoundError:  # the model is from a cache that has nothing else of it
                return missing
            except (OSError, httpx.HTTPError) as error:
                raise FileNotFoundError(
                    f"The tokenizer of the base model '{self.name}' cannot be fetched: {first_line(error)}; try again."
                ) from None
        found = [path for pattern in _BESIDES for path in source.glob(pattern) if path.is_file()]
        for path in found:
            if not (folder / path.name).exists():  # transformers wrote its own
                shutil.copyfile(path, folder / path.name)
        return [] if any(path.name != "generation_config.json" for path in found) else missing


def model_class(config: Any, name: str) -> Any:
    """Transformers' class of the model, as its config says; no other code is run."""
    kind = getattr(transformers, (config.architectures or ["None"])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(f"The model '{name}' is of a class that transformers does not have.")
    return kind


def fold(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """Add an adapter's deltas to the model's weights, in place; of a merge with a gate, the merged LoRA."""
    pairs = read_pairs(adapter)
    _take_base_tensors(model, adapter)
    _untie(model, pairs)
    config, tensors = as_lora(adapter, pairs, largest_rank(pairs), MAnyConfig, projector_modules=[])
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
