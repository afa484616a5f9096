"""Lets statistics follow an adapter through every way of loading it, and checks its files before PEFT reads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftWarning

from ..files.errors import MalformedAdapterError, StatisticsError, unusable_config
from ..files.statistics import AdapterStatistics
from ..files.tensor_file import open_tensors
from ..files.untrusted import NONSENSE_ERRORS, check_backed, check_config
from ..files.upstream import wrap_method
from ..records.checking import RecordError
from ..tuner.config import MAnyConfig
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
        _check_loaded(config, source, subfolder, where)
    if isinstance(config, PeftConfig):
        try:
            statistics = locate_statistics(pretrained_model_name_or_path, subfolder, **where)
        except StatisticsError as error:  # which using the adapter does not need; merging reads them strictly
            warnings.warn(f"The adapter is loaded without its statistics. {error}", PeftWarning, stacklevel=3)
            return config
        # An adapter of another type on the Hub rarely has statistics; asking for them at each save would be rude.
        if isinstance(statistics, AdapterStatistics) or isinstance(config, MAnyConfig):
            give_statistics(config, statistics)
    return config


def _check_loaded(config: MAnyConfig, source: str, subfolder: str | None, where: Mapping[str, Any]) -> None:
    """Refuse a config that nobody in good faith wrote, before PEFT allocates what it asks for."""
    check_config(config, source)
    config.loaded_from = source  # no fields: what a user makes of it is the user's own
    folder = Path(source, subfolder or "")
    path = folder / SAFETENSORS_WEIGHTS_NAME if folder.is_dir() else _weights_on_hub(config, source, subfolder, where)
    weights = open_tensors(path, MalformedAdapterError) if path is not None and path.is_file() else None
    check_backed(config, weights, source)
    config.loaded_keys = frozenset(weights or ())


def _weights_on_hub(config: MAnyConfig, source: str, subfolder: str | None, where: Mapping[str, Any]) -> Path | None:
    """The weights on the Hub that a config speaks of, if it is to be checked by them and there are any.

    PEFT is about to load them; but a config by itself can be read too.
    """
    try:
        check_backed(config, None, source)
        is_backed = True
    except MalformedAdapterError:  # unless its weights say so too
        is_backed = False
    if is_backed and not config.modules_to_save:
        return None
    try:
        return Path(hf_hub_download(source, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **where))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and not is_backed:
            raise  # the Hub cannot be reached
        return None
