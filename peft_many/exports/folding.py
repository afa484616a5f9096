"""Folding an adapter's deltas into its base model: the one place that loads a model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..files.adapter import Adapter
from ..files.stored_delta import KEY_PREFIX
from ..hub.sources import first_line
from ..merging.base_model import check_fits_model
from ..tuner.config import MAnyConfig
from .result import read_pairs

# Notes on what is lost or missing in every folded model.
GATE_LOST = "It has the merged LoRA for all inputs; images choose no task's own any more (`gate_lora`)."
NO_TOKENIZER = "No tokenizer or processor was found beside the base model, so none is here."

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
    """Which model an adapter belongs to.

    Args:
        name (`str`): A folder or Hub id.
        revision (`str`, *optional*): On the Hub.
    """

    name: str
    revision: str | None

    @classmethod
    def of(cls, given: str | os.PathLike[str] | None, adapter: Adapter) -> BaseModel:
        """The one given (`"me/model@revision"` too), or the one that the adapter's config names.

        Raises:
            ValueError: Nobody says which model it is.
        """
        if given is None:
            name, revision = adapter.config.base_model_name_or_path, adapter.config.revision
        elif Path(given).expanduser().is_dir():
            name, revision = str(Path(given).expanduser()), None
        else:
            name, _, at = str(given).partition("@")
            revision = at or None
        if not name:
            raise ValueError("The adapter does not say which base model it is of; pass `base_model`.")
        return cls(name, revision)


def load_base(base: BaseModel, hub: Mapping[str, Any]) -> PreTrainedModel:
    """The base model, in the dtype that it is stored in. No code but transformers' own is run.

    Args:
        base ([`BaseModel`]): Which one.
        hub (`Mapping[str, Any]`): `token`, `cache_dir` and `local_files_only`.

    Raises:
        ValueError: Transformers does not know its class.
        FileNotFoundError: It cannot be found.
    """
    try:
        config = AutoConfig.from_pretrained(base.name, revision=base.revision, **hub)
        kind = model_class(config, base.name)
        model: PreTrainedModel = kind.from_pretrained(base.name, revision=base.revision, dtype="auto", **hub)
    except OSError as error:  # which those of the Hub are too
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"The base model '{base.name}' cannot be loaded: {reason}") from None
    return model.eval()


def model_class(config: Any, name: str) -> Any:
    """Transformers' class of the model, as its config says.

    Raises:
        ValueError: Transformers has none of that name; no other code is run.
    """
    kind = getattr(transformers, (config.architectures or ["None"])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(f"The model '{name}' is of a class that transformers does not have.")
    return kind


def folded(
    model: PreTrainedModel, adapter: Adapter, projectors: Mapping[str, Mapping[str, Tensor]]
) -> PreTrainedModel:
    """The model with the adapter's deltas added to its weights, and with these projectors; in place.

    Args:
        model (`PreTrainedModel`): The base model.
        adapter ([`Adapter`]): Its adapter; a gate is left out, the merged LoRA serves all inputs.
        projectors (`Mapping[str, Mapping[str, torch.Tensor]]`): Their state dicts; where there is none, the model's
            own stays.

    Raises:
        UnmergeableAdapterError: The adapter does not fit the model.
    """
    pairs = read_pairs(adapter)
    rank = max(A.shape[0] for A, _ in pairs.values())
    ranks = {module.replace(".", r"\."): A.shape[0] for module, (A, _) in pairs.items() if A.shape[0] != rank}
    config = MAnyConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=sorted(pairs),
        projector_modules=list(projectors),
        modules_to_save=list(projectors) or None,
        fan_in_fan_out=bool(getattr(adapter.config, "fan_in_fan_out", False)),
        inference_mode=True,
    )
    tensors = {}
    for module, (A, B) in pairs.items():
        tensors[f"{KEY_PREFIX}{module}.lora_A.weight"] = A.float()
        tensors[f"{KEY_PREFIX}{module}.lora_B.weight"] = B.float()
    for name, own in projectors.items():
        tensors |= {f"{KEY_PREFIX}{name}.{key}": tensor for key, tensor in own.items()}
    check_fits_model(config, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, model)
    peft_model = get_peft_model(model, config)
    set_peft_model_state_dict(peft_model, tensors)
    plain: PreTrainedModel = peft_model.merge_and_unload()
    return plain


def copy_besides(base: BaseModel, folder: Path, hub: Mapping[str, Any]) -> bool:
    """Copy the base model's tokenizer and processor files; whether there were any.

    Raises:
        FileNotFoundError: The Hub did not give them.
    """
    source = Path(base.name)
    if not source.is_dir():
        try:
            found_at = snapshot_download(base.name, revision=base.revision, allow_patterns=list(_BESIDES), **hub)
        except LocalEntryNotFoundError:  # the model is from a cache that has nothing else of it
            return False
        except (OSError, httpx.HTTPError) as error:
            raise FileNotFoundError(
                f"The tokenizer of the base model '{base.name}' cannot be fetched: {first_line(error)}; try again."
            ) from None
        source = Path(found_at)
    found = [path for pattern in _BESIDES for path in source.glob(pattern) if path.is_file()]
    for path in found:
        if not (folder / path.name).exists():  # transformers wrote its own
            shutil.copyfile(path, folder / path.name)
    return any(path.name != "generation_config.json" for path in found)
