"""Where an adapter's files are; opening them, of which no tensor is read yet, and writing them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from .errors import UnmergeableAdapterError, unusable_config
from .tensor_file import TensorFile, open_tensors
from .untrusted import LARGEST_CONFIG, NONSENSE_ERRORS, check_config

_KEY = re.compile(r"[\w-]+(?:\.[\w-]+)*")


@dataclass(frozen=True)
class AdapterSource:
    """A local copy of an adapter, and where it came from."""

    folder: Path
    name: str  # what the user called it: a path or a Hub id
    revision: str | None = None  # the commit, for a Hub repository

    @property
    def short_name(self) -> str:
        """The last part of the name, the default name of the task."""
        return Path(self.folder if self.revision is None else self.name).resolve().name

    @property
    def public_name(self) -> str:
        """What a merge's config and card call it: local paths are nobody else's business."""
        return self.short_name if self.revision is None else self.name


def read_config(source: AdapterSource) -> PeftConfig:
    """An adapter's config, checked as any adapter's can be, be it one to merge or not."""
    if not (source.folder / CONFIG_NAME).is_file():
        raise UnmergeableAdapterError(f"{source.name} has no {CONFIG_NAME}: {_what_else(source)}.")
    if (source.folder / CONFIG_NAME).stat().st_size > LARGEST_CONFIG:
        raise UnmergeableAdapterError(f"{source.name}: {CONFIG_NAME} is larger than {LARGEST_CONFIG >> 20} MiB.")
    try:
        # As `PeftConfig.from_pretrained` does, but for the statistics that it would look for and read
        fields = PeftConfig.from_json_file(str(source.folder / CONFIG_NAME))
        config: PeftConfig = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**fields))
    except (*NONSENSE_ERRORS, ValueError) as error:
        # ValueError covers broken JSON and the messages of configs, which are written for people.
        reason = f"{error} is unknown" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise unusable_config(source.name, reason) from error
    check_config(config, source.name)
    return config


def _what_else(source: AdapterSource) -> str:
    """What a folder without an adapter's config is, for messages."""
    inside = sorted(path.parent for path in source.folder.glob(f"*/{CONFIG_NAME}"))
    if inside:
        several = "adapters lie in subfolders of it; give one of them" if len(inside) > 1 else "give its subfolder"
        return f"{several}, {', '.join(map(repr, map(str, inside[:5])))}"
    if (source.folder / "config.json").is_file():
        return "it is a whole model; give an adapter"
    at_hub = "; if the adapter lies in a subfolder, download that and give the folder"
    return f"it is no PEFT adapter{at_hub if source.revision else ''}"


def open_weights(source: AdapterSource) -> TensorFile:
    """Its tensors, of which nothing is read yet."""
    path = source.folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        why = "."
        if (source.folder / WEIGHTS_NAME).is_file():
            why = f"; its {WEIGHTS_NAME} is a pickle, which is never opened. Save it again as safetensors."
        raise UnmergeableAdapterError(f"{source.name} has no {SAFETENSORS_WEIGHTS_NAME}{why}")
    weights = open_tensors(path, UnmergeableAdapterError)
    strange = next((key for key in weights if not _KEY.fullmatch(key)), None)
    if strange is not None:  # it would be part of patterns, tables and messages
        raise UnmergeableAdapterError(
            f"{source.name}: the name of its tensor {strange!r:.200} cannot be that of a module's weight."
        )
    return weights


def write_adapter(folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's weights into an existing folder, and its config with what it carries: statistics, a card."""
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}  # as safetensors asks for
    save_file(contiguous, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    config.save_pretrained(folder)
