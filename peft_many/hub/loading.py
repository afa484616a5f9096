"""Lets statistics follow an adapter through every way of loading it, and checks its files before PEFT uses them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftWarning
from torch import nn

from ..files.errors import MalformedAdapterError, StatisticsError, UnmergeableAdapterError, unusable_config
from ..files.source import AdapterSource
from ..files.statistics import AdapterStatistics
from ..files.tensor_file import open_tensors
from ..files.untrusted import NONSENSE_ERRORS, check_backed, check_config
from ..files.upstream import wrap_method
from ..records.checking import RecordError
from ..tuner.config import MAnyConfig
from ..tuner.loaded_keys import key_mapping
from ..tuner.registration import give_statistics
from .sources import locate_statistics


def find_statistics() -> None:
    """Let every way of loading an adapter check its files and find its statistics. Again, it changes nothing."""
    wrap_method(PeftConfig, "from_pretrained", _load_with_statistics)


def _load_with_statistics(
    load: Callable[..., Any], cls: type, pretrained_model_name_or_path: str, subfolder: Any = None, **kwargs: Any
) -> Any:
    """`PeftConfig.from_pretrained`, with checks of what is loaded, and with the statistics that lie beside it."""
    source = str(pretrained_model_name_or_path)
    try:
        config = load(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
    except RecordError as error:
        raise unusable_config(source, f"{error!s:.300}") from error
    except NONSENSE_ERRORS as error:
        if not issubclass(cls, MAnyConfig):
            raise  # as PEFT does
        raise unusable_config(source, f"{error!r:.300}") from error
    where = {name: kwargs.get(name) for name in ("revision", "token", "cache_dir")}
    if isinstance(config, MAnyConfig):
        check_config(config, source)
        # No fields: what a user makes of it is the user's own.
        config.loaded_from, config.loaded_weights = source, LoadedWeights(source, subfolder, where)
    try:
        statistics = locate_statistics(pretrained_model_name_or_path, subfolder, **where)
    except StatisticsError as error:  # which using the adapter does not need; merging reads them strictly
        warnings.warn(f"The adapter is loaded without its statistics. {error}", PeftWarning, stacklevel=3)
        return config
    # An adapter of another type on the Hub rarely has statistics; asking for them at each save would be rude.
    if isinstance(statistics, AdapterStatistics) or isinstance(config, MAnyConfig):
        give_statistics(config, statistics)
    return config


def put_on(base: nn.Module, source: AdapterSource) -> PeftModel:
    """A base model with an adapter, whatever PEFT type it has, and whatever the model's parts were called then."""
    mapping = None
    path = source.folder / SAFETENSORS_WEIGHTS_NAME
    if path.is_file() and not isinstance(PeftConfig.from_pretrained(str(source.folder)), MAnyConfig):
        mapping = key_mapping(open_tensors(path, MalformedAdapterError), base) or None  # our own looks by itself
    try:
        return PeftModel.from_pretrained(base, str(source.folder), key_mapping=mapping)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        first = next(line for line in str(error).splitlines() if "size mismatch" in line).strip()
        raise UnmergeableAdapterError(
            f"{source.name} does not fit the base model, whose layers have other shapes: it was trained on another. "
            f"({first})"
        ) from error


class LoadedWeights:
    """The weights beside a config, looked at when a model is built: a config by itself can be read too."""

    def __init__(self, source: str, subfolder: str | None, where: Mapping[str, Any]) -> None:
        self.source, self.subfolder, self.where = source, subfolder, where

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "where": {**self.where, "token": None}}  # a token must stay out of pickles

    def keys_backing(self, config: MAnyConfig) -> Collection[str]:
        """Refuse a config that nobody in good faith wrote, before PEFT allocates what it asks for.

        The keys of the weights, by which more can be checked.
        """
        folder = Path(self.source, self.subfolder or "")
        path = folder / SAFETENSORS_WEIGHTS_NAME if folder.is_dir() else self._on_hub()
        weights = open_tensors(path, MalformedAdapterError) if path is not None and path.is_file() else None
        check_backed(config, weights, self.source)
        return list(weights or ())

    def _on_hub(self) -> Path | None:
        """The file on the Hub, which PEFT loads next; none if it is not there, or the Hub cannot be reached."""
        try:
            return Path(hf_hub_download(self.source, SAFETENSORS_WEIGHTS_NAME, subfolder=self.subfolder, **self.where))
        except EntryNotFoundError:
            return None
