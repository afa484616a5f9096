"""Lets statistics follow an adapter through every way of loading it, and checks its files before PEFT reads them."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftWarning
from safetensors import SafetensorError

from ..files.statistics import AdapterStatistics, StatisticsError
from ..files.tensor_file import TensorFile
from ..files.untrusted import NONSENSE_ERRORS, MalformedAdapterError, check_backed, check_config
from ..records.checking import RecordError
from ..tuner.config import MAnyConfig
from ..tuner.registration import give_statistics
from .sources import locate_statistics


def find_statistics() -> None:
    """Wrap `PeftConfig.from_pretrained`, the one call that sees an adapter's folder on every way of loading.

    `PeftModel.from_pretrained` asks the config class of the adapter's type, but transformers' `load_adapter` asks the
    base class, so that an override in `MAnyConfig` does not run there, and nothing later on that way knows the folder.
    Adapters of other types have no class of ours at all. `tests/tuner/test_registration.py` fails when that changes.
    """
    if hasattr(PeftConfig.from_pretrained, "finds_statistics"):
        return
    original = PeftConfig.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: str, subfolder: Any = None, **kwargs: Any) -> Any:
        try:
            config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (*NONSENSE_ERRORS, RecordError) as error:
            if not issubclass(cls, MAnyConfig) and not isinstance(error, RecordError):
                raise  # as PEFT does
            source, reason = (
                str(pretrained_model_name_or_path),
                error if isinstance(error, RecordError) else repr(error),
            )
            raise MalformedAdapterError(f"{source}: adapter_config.json cannot be used: {reason!s:.300}.") from error
        if isinstance(config, MAnyConfig):
            _check_loaded(config, str(pretrained_model_name_or_path), subfolder, kwargs)
        if isinstance(config, PeftConfig):
            where = {name: kwargs.get(name) for name in ("revision", "token", "cache_dir")}
            try:
                statistics = locate_statistics(pretrained_model_name_or_path, subfolder, **where)
            except StatisticsError as error:  # which using the adapter does not need; merging reads them strictly
                warnings.warn(f"The adapter is loaded without its statistics. {error}", PeftWarning, stacklevel=2)
                return config
            # An adapter of another type on the Hub rarely has statistics; asking for them at each save would be rude.
            if isinstance(statistics, AdapterStatistics) or isinstance(config, MAnyConfig):
                give_statistics(config, statistics)
        return config

    from_pretrained.finds_statistics = True  # type: ignore[attr-defined]
    for owner in PeftConfig.__mro__:
        if "from_pretrained" in vars(owner):
            owner.from_pretrained = classmethod(from_pretrained)  # type: ignore[arg-type]
            return


def _check_loaded(config: MAnyConfig, source: str, subfolder: str | None, kwargs: Mapping[str, Any]) -> None:
    """Refuse a config that nobody in good faith wrote, before PEFT allocates what it asks for."""
    check_config(config, source)
    config.loaded_from = source  # no fields: what a user makes of it is the user's own
    folder = Path(source, subfolder or "")
    path: str | Path | None = folder / SAFETENSORS_WEIGHTS_NAME
    if not folder.is_dir():
        path = None
        try:
            check_backed(config, None, source)
        except MalformedAdapterError:  # unless its weights, which PEFT is about to load, say so too
            path = _download_weights(source, subfolder, kwargs)
        else:
            if config.modules_to_save:
                with contextlib.suppress(LocalEntryNotFoundError):  # a config can be read where the Hub is away
                    path = _download_weights(source, subfolder, kwargs)
    try:
        weights = TensorFile(Path(path)) if path and Path(path).is_file() else None
        check_backed(config, weights, source)
    except SafetensorError as error:
        raise MalformedAdapterError(f"{path} is damaged or truncated ({error}).") from None
    config.loaded_keys = frozenset(weights or ())


def _download_weights(source: str, subfolder: str | None, kwargs: Mapping[str, Any]) -> str | None:
    """The weights on the Hub that a config speaks of, which PEFT is about to load; `None` if there are none."""
    where: dict[str, Any] = {key: kwargs.get(key) for key in ("revision", "token", "cache_dir")}
    try:
        return hf_hub_download(source, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **where)
    except LocalEntryNotFoundError:
        raise  # the Hub cannot be reached
    except EntryNotFoundError:
        return None
