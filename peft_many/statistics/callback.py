"""`MAnyCallback`: measures the adapter at the end of `Trainer` training."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import recursively_apply
from peft.utils import PeftWarning
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .collect import collect_statistics
from .forward import batch_size, check_batch, check_batches, state_kept


class MAnyCallback(TrainerCallback):
    """Runs `collect_statistics` when `Trainer` has finished training, so that `save_model` saves what merging needs.

    Works in trainers that build on it too, such as TRL's SFT, DPO and GRPO trainers. Checkpoints on the way have no
    statistics; with `load_best_model_at_end` the best weights are measured.

    What rules measuring out is an error before the first step. What fails at the end is a warning: training is done,
    and the adapter can be saved and measured later.

    Args:
        dataloader (`Iterable`, *optional*):
            What to measure on. Defaults to the training dataloader. Where that is a stream, or gives something else
            than the model is called with, as in preference and reinforcement learning, the last batches that the
            model was trained on are kept in CPU memory and measured: DPO's chosen and rejected rows alike, and GRPO's
            prompts with their completions.
        adapter_name (`str`, *optional*):
            The adapter to measure. Defaults to the active one.
        max_samples (`int`, *optional*, defaults to 256):
            As in [`collect_statistics`], like all further keyword arguments. `None` keeps 256 rows of a stream.

    Example:

        ```py
        >>> measuring = MAnyCallback(max_samples=128)
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[measuring])
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
        self._last: LastCalls | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check all that can be known now, when an error costs no training."""
        if model is None or (self.dataloader is None and train_dataloader is None):
            raise ValueError("`MAnyCallback` found no dataloader to measure on; pass one.")
        if self.dataloader is not None:
            check_batches(self.dataloader, None, self.options.get("forward_fn"))
            if self.options.get("forward_fn") is None and hasattr(self.dataloader, "__getitem__"):
                with state_kept(model):  # of a data set in a loader's place, whose rows may be drawn at random
                    for row in itertools.islice(self.dataloader, 1):
                        check_batch(row)
        _rehearse(model, self.options)
        self._forget()
        if self.dataloader is None and self.options.get("forward_fn") is None:
            rows = -(-(self.options["max_samples"] or 256) // args.world_size)
            self._last = LastCalls(model, rows, _keys_of_batches(model, train_dataloader))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure the trained adapter. Nothing that goes wrong here may keep the user from saving it."""
        last = self._last.calls if self._last is not None else None
        batches = self.dataloader if self.dataloader is not None else last or train_dataloader
        options = {"progress": not args.disable_tqdm, **self.options}
        try:
            collect_statistics(model, batches, **options)  # type: ignore[arg-type]
        except Exception as error:
            warnings.warn(
                f"The adapter is trained, but could not be measured ({type(error).__name__}: {error}). Save it as "
                "always. Before merging, load it, call `collect_statistics(model, dataloader)` with batches that the "
                "model takes, and save it again.",
                PeftWarning,
                stacklevel=2,
            )
        finally:
            self._forget()

    def _forget(self) -> None:
        if self._last is not None:
            self._last.hook.remove()
        self._last = None


class LastCalls:
    """The last batches that a model was called with in training, on the CPU: enough for a number of `rows`.

    Nothing is kept if the model is called with what the dataloader gives, batches of these `keys`, as the first call
    tells: they can be read again.
    """

    def __init__(self, model: nn.Module, rows: int, keys: Collection[str] | None) -> None:
        self.calls: deque[dict[str, Any]] = deque()
        self.rows, self.keys, self._held = rows, keys, 0
        self.hook = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep(self, model: nn.Module, args: tuple[Any, ...], batch: dict[str, Any]) -> None:
        if args or not (model.training and torch.is_grad_enabled()):  # evaluation, a reference model, generation
            return
        if self.keys is not None and batch.keys() >= {*self.keys} - {"labels"}:  # losses may be computed outside
            self.hook.remove()
            return
        self.calls.append(recursively_apply(_to_cpu, batch))
        self._held += batch_size(batch)
        while self._held - batch_size(self.calls[0]) >= self.rows:
            self._held -= batch_size(self.calls.popleft())


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def _keys_of_batches(model: nn.Module, dataloader: Any) -> Collection[str] | None:
    """The keys of the dataloader's batches, by a batch of one row; `None` for streams, and if there are none."""
    try:
        with state_kept(model):
            batch = dataloader.collate_fn([dataloader.dataset[0]])
    except Exception:  # of any dataset, which training will say
        return None
    return list(batch) if isinstance(batch, Mapping) else None


class _Ready(Exception):  # noqa: N818
    """Nothing but batches is missing."""


def _rehearse(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Do what `collect_statistics` does before the first batch, in all processes."""

    def no_batch() -> Iterator[Any]:
        raise _Ready
        yield

    with contextlib.suppress(_Ready):
        collect_statistics(model, no_batch(), **{**options, "progress": False})
