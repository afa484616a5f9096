"""Makes PEFT know the type `MANY`, and lets configs of other types carry statistics too."""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import MAnyConfig, MAnyPeftType, Statistics
from .model import MAnyModel


def register() -> None:
    """Enter `MANY` into PEFT's tables. Importing `peft_many` does this; doing it again changes nothing."""
    # PEFT's `register_peft_method` refuses names that are not in its enum, and there is no entry point for plugins.
    PEFT_TYPE_TO_CONFIG_MAPPING[MAnyPeftType.MANY] = MAnyConfig
    PEFT_TYPE_TO_TUNER_MAPPING[MAnyPeftType.MANY] = MAnyModel
    PEFT_TYPE_TO_PREFIX_MAPPING[MAnyPeftType.MANY] = MAnyModel.prefix
    if not hasattr(PeftConfig.save_pretrained, "saves_statistics"):
        _let_configs_save_statistics()


def give_statistics(config: PeftConfig, statistics: Statistics | None) -> None:
    """Make a config carry statistics, so that saving the adapter saves them too; of any PEFT type."""
    config.statistics = statistics


def _let_configs_save_statistics() -> None:
    """Wrap `PeftConfig.save_pretrained` for the configs of other types that `give_statistics` was called with.

    A method of the object in its place would save the old object from a shallow copy.
    """
    owner = next(owner for owner in PeftConfig.__mro__ if "save_pretrained" in vars(owner))
    original = owner.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str, **kwargs: Any) -> None:
        original(self, save_directory, **kwargs)
        if not isinstance(self, MAnyConfig) and getattr(self, "statistics", None) is not None:
            self.statistics.save(save_directory)

    save_pretrained.saves_statistics = True  # type: ignore[attr-defined]
    owner.save_pretrained = save_pretrained
