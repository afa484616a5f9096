"""`MAnyCallback`: measures the adapter at the end of `Trainer` training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .collect import collect_statistics


class MAnyCallback(TrainerCallback):
    """Runs `collect_statistics` when `Trainer` has finished training, so that `save_model` saves what merging needs.

    Works in trainers that build on it too, such as TRL's `SFTTrainer`. Checkpoints on the way have no statistics.

    Args:
        dataloader (`Iterable`, *optional*):
            What to measure on. Defaults to the training dataloader.
        adapter_name (`str`, *optional*):
            The adapter to measure. Defaults to the active one.
        max_samples (`int`, *optional*, defaults to 256):
            As in [`collect_statistics`], like all further keyword arguments.

    Example:

        ```py
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[MAnyCallback(max_samples=128)])
        >>> trainer.train()
        >>> trainer.save_model("clevr")
        ```
    """

    def __init__(
        self,
        dataloader: Iterable[Any] | None = None,
        *,
        adapter_name: str | None = None,
        max_samples: int | None = 256,
        **kwargs: Any,
    ) -> None:
        self.dataloader = dataloader
        self.options = {"adapter_name": adapter_name, "max_samples": max_samples, **kwargs}

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure the trained adapter."""
        dataloader = self.dataloader if self.dataloader is not None else train_dataloader
        if model is None or dataloader is None:
            raise ValueError("`MAnyCallback` found no dataloader to measure on; pass one.")
        options = {"progress": not args.disable_tqdm, **self.options}
        collect_statistics(model, dataloader, **options)
