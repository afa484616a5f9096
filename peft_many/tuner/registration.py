"""Makes PEFT know the type `MANY`, and lets configs of other types carry statistics too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..files.card import update_card
from ..files.upstream import enter_peft_type, wrap_method
from .config import MAnyConfig, MAnyPeftType, Statistics
from .model import MAnyModel


def register() -> None:
    """Make PEFT know `MANY`. Importing `peft_many` does this; doing it again changes nothing."""
    enter_peft_type(MAnyPeftType.MANY, MAnyConfig, MAnyModel)
    wrap_method(PeftConfig, "save_pretrained", _save_with_statistics)


def give_statistics(config: PeftConfig, statistics: Statistics | None) -> None:
    """Make a config carry statistics, so that saving the adapter saves them too; of any PEFT type."""
    config.statistics = statistics


def _save_with_statistics(save: Callable[..., None], config: Any, save_directory: str, **kwargs: Any) -> None:
    """`PeftConfig.save_pretrained`, also of the configs of other types that `give_statistics` was called with.

    A method of the object in its place would save the old object from a shallow copy.
    """
    save(config, save_directory, **kwargs)
    if not isinstance(config, MAnyConfig) and getattr(config, "statistics", None) is not None:
        config.statistics.save(save_directory)
        update_card(Path(save_directory), config)
