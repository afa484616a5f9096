"""The hook that reads a task's instructions where the model is called."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.utils import PeftWarning
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..routing.instructions import features_of_instructions
from ..routing.row_weights import cached_length
from ..routing.watched import arguments_of
from .features import PooledFeatures, finished

_NAME = "instructions"


class InstructionHook:
    """Sums up `instruction_features` of the calls of a base model while the `with` block runs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._found: dict[str, PooledFeatures] = {}
        self._handle: RemovableHandle | None = None
        self._untold: list[Tensor] = []
        self.counts = True  # whether what is read is new, and not lent by another process

    def __enter__(self) -> InstructionHook:
        self._handle = self.model.register_forward_pre_hook(self._read, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def result(self) -> dict[str, PooledFeatures]:
        """What was seen, under one name; nothing if no call had token ids."""
        return finished(self._found, "The base model's token embeddings hold NaN or Inf.")

    def warn_of_untold(self) -> None:
        """Warn the caller of the caller if there were instructions that could not be told from answers."""
        count = int(torch.stack(self._untold).sum()) if self._untold else 0
        if count:
            warnings.warn(
                f"{count} samples have no `labels` that are -100 on the prompt, so that instructions cannot be told "
                "from answers: gates of a merge that go by instructions will look at both.",
                PeftWarning,
                stacklevel=3,
            )

    def _read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = arguments_of(model.forward, args, kwargs)
        if cached_length(arguments.get("past_key_values")):
            return  # a step of answering
        read = features_of_instructions(model, arguments)  # sharded embeddings take all processes
        if read is None or not self.counts:
            return
        instructions, features = read
        self._untold.append((instructions.kept.any(1) & ~instructions.told).sum())
        self._found.setdefault(_NAME, PooledFeatures.none_of(features)).add(features)
