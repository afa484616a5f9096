"""The base model of an adapter: which it is, loaded, and its tokenizer and processor."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from peft.utils import CONFIG_NAME
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, PreTrainedModel

from ..algebra.devices import answers, has_half_precision, multiply_rows_at_once
from ..families.parts import find_projectors, parts_of
from ..files.card import is_repo_id
from ..files.peft_methods import has_no_layers
from ..files.source import AdapterSource, read_config
from ..records import merge_of
from .sources import HubArguments, first_line

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


_HINT = " If it is in another folder, pass that as `base_model`, on the command line `--base-model`."


@dataclass(frozen=True)
class BaseModel:
    """Which model an adapter belongs to, and how to download it."""

    name: str  # a folder or Hub id
    revision: str | None
    hub: HubArguments = field(repr=False)

    @classmethod
    def of(cls, given: str | os.PathLike[str] | None, config: Any, hub: HubArguments) -> BaseModel:
        """The one given (`"me/model@revision"` too), or the one that the adapter's config names."""
        if not isinstance(given, (str, os.PathLike, type(None))):
            raise ValueError(f"`base_model` must be a folder or a Hub id, but it is a {type(given).__name__}.")
        if merge_of(config) is not None and has_no_layers(config):
            raise ValueError(
                "It is a routed model, which `export_routed_model` wrote with its base model inside: load it by "
                "`load_routed_model`, or give the merge that it was made of."
            )
        if given is None:
            name, revision = config.base_model_name_or_path, config.revision
        elif Path(given).expanduser().is_dir():
            name, revision = str(Path(given).expanduser()), None
        else:
            name, _, at = str(given).partition("@")
            revision = at or None
        if not name:
            raise ValueError(
                "The adapter does not name its base model; pass `base_model`, on the command line `--base-model`."
            )
        if not Path(name).expanduser().is_dir() and not is_repo_id(name):
            named = "" if given is not None else ", by which the adapter names its base model"
            raise FileNotFoundError(f"There is no folder '{name}'{named}.{_HINT}")
        if given is not None:
            _check_whole(Path(name))
        return cls(name, revision, hub)

    def load(self, **options: Any) -> PreTrainedModel:
        """The model, in the dtype that it is stored in unless `options` of `from_pretrained` say otherwise.

        No code but transformers' own is run.
        """
        options = {"dtype": "auto", "revision": self.revision, **options, **self.hub}
        kind, _ = self._described()
        try:
            model: PreTrainedModel = kind.from_pretrained(self.name, **options)
        except OSError as error:  # which those of the Hub are too
            raise self._missing("The base model", error) from None
        multiply_rows_at_once(model.get_output_embeddings())
        return model.eval()

    def empty(self) -> PreTrainedModel:
        """The model without its weights, on the device `meta`: of it only the config is read."""
        kind, config = self._described()
        with torch.device("meta"):
            model: PreTrainedModel = kind(config)
        return model.eval()

    def _described(self) -> tuple[Any, PreTrainedConfig]:
        """The model's class and its config."""
        try:
            config = AutoConfig.from_pretrained(self.name, revision=self.revision, **self.hub)
        except OSError as error:
            raise self._missing("The base model", error) from None
        return model_class(config, self.name), config

    def load_on(self, device: str | torch.device | None, **options: Any) -> PreTrainedModel:
        """The model on a device: by default on the accelerator, if there is one.

        With a `quantization_config` of bitsandbytes that does not say what to leave alone, the projectors, which tasks
        train, and the vision tower are left alone.
        """
        if device is None:
            device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        answers(device, torch.float32)  # before the model is loaded for it, which takes long
        quantised = options.get("quantization_config")
        if quantised is None:
            model = self.load(**options)
            if "device_map" not in options:
                model.to(device)
            _warn_of_slow_products(model)
            return model
        if getattr(quantised, "llm_int8_skip_modules", ()) is None:
            quantised.llm_int8_skip_modules = [*self._visual_parts(), "lm_head"]
        # It says at each layer of each batch that inputs are cast, as 8 bits always do.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        model = self.load(**{"device_map": {"": str(device)}, **options})
        _check_four_bits(model)
        return model

    def _visual_parts(self) -> list[str]:
        """The names of the vision tower and the projectors."""
        empty = self.empty()
        parts = parts_of(empty)
        return [*(parts.towers if parts is not None else ()), *find_projectors(empty)]

    def load_processor(self) -> Any:
        """The model's processor; of a model of text its tokenizer."""
        try:
            return AutoProcessor.from_pretrained(self.name, revision=self.revision, **self.hub)
        except OSError as error:
            raise self._missing("The processor of the base model", error) from None

    def _missing(self, what: str, error: OSError) -> FileNotFoundError:
        return FileNotFoundError(f"{what} '{self.name}' cannot be loaded: {first_line(error)}{_HINT}")

    def copy_tokenizer(self, folder: Path) -> list[str]:
        """Copy the model's tokenizer and processor files; what to note if there are none."""
        source = Path(self.name)
        missing = ["The base model has no tokenizer or processor, so none was written."]
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


def _check_whole(folder: Path) -> None:
    """Refuse an adapter's folder where a base model's is asked for."""
    if (folder / "config.json").is_file() or not (folder / CONFIG_NAME).is_file():
        return
    source = AdapterSource(folder, str(folder))
    named = read_config(source).base_model_name_or_path
    of = f"; its base model is '{named}'" if named else ""
    raise ValueError(
        f"'{folder}' is an adapter, not a base model{of}. Give the base model, or leave `base_model` (`--base-model`) "
        "out."
    )


def _warn_of_slow_products(model: PreTrainedModel) -> None:
    if model.dtype.itemsize == 2 and not has_half_precision(model.device):
        named = str(model.dtype).removeprefix("torch.")
        warnings.warn(
            f"The base model is in {named}, which this CPU has no instructions for: reading takes about five times as "
            'long as with `--load-in float32`, `model_options={"dtype": "float32"}` in Python, which takes twice the '
            "memory.",
            stacklevel=3,
        )


def _check_four_bits(model: PreTrainedModel) -> None:
    """Refuse a model that bitsandbytes has loaded in 4 bits and cannot compute with: on a CPU, of an odd width."""
    for name, layer in model.named_modules():
        if type(layer).__name__ != "Linear4bit" or layer.weight.device.type != "cpu":
            continue
        block = getattr(layer.weight, "blocksize", 64)
        if layer.in_features % block:
            raise ValueError(
                f"On a CPU, bitsandbytes computes in 4 bits only with layers whose width is a multiple of {block}; "
                f"'{name}' of the base model has {layer.in_features}. Load it in 8 bits, or whole, or use a GPU."
            )


def model_class(config: Any, name: str) -> Any:
    """Transformers' class of the model, as its config says; no other code is run."""
    kind = getattr(transformers, (config.architectures or ["None"])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(f"The model '{name}' is of a class that transformers does not have.")
    return kind
