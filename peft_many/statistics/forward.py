"""Running a model over batches without leaving a trace: its modes, its active adapter, its random state."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..files.processes import Processes
from ..tuner.layers import has_adapter
from .tokens import MASK_NAMES

_END = object()


@contextlib.contextmanager
def in_inference(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """The model as in inference with this one adapter, without gradients; afterwards it is as it was."""
    with (
        state_kept(model),
        only_active(model, adapter_name),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),  # compiled for one pass and its hooks, it would not pay
    ):
        model.eval()
        yield


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Restore each module's training mode, each parameter's `requires_grad`, and all random states."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    python, numpy = random.getstate(), np.random.get_state()
    kind, gpus = _gpus_of(model)
    try:
        with torch.random.fork_rng(gpus, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def _gpus_of(model: nn.Module) -> tuple[str, list[int]]:
    """The kind of a model's devices with a random state of their own each, and which these are."""
    devices = {parameter.device for parameter in model.parameters()}
    found = sorted((device.type, device.index or 0) for device in devices if device.type not in ("cpu", "meta", "mps"))
    return (found[0][0] if found else "cuda"), [index for _, index in found]


@contextlib.contextmanager
def only_active(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Make one adapter the only active and enabled one, and put back each layer's own state."""
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(True)
            layer.set_adapter([adapter_name] if has_adapter(layer, adapter_name) else [])
        yield
    finally:
        for layer, active, disabled in before:
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)


def forward(model: nn.Module, batch: Any, forward_fn: Callable[[nn.Module, Any], Any] | None) -> None:
    """One forward pass: of a mapping's keyword arguments, a tuple's positional ones, or as `forward_fn` says."""
    if forward_fn is not None:
        forward_fn(model, batch)
        return
    check_batch(batch)
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def check_batch(batch: Any) -> None:
    """Refuse what no model is called with, such as rows that no collator made into tensors, with a `ValueError`."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    inside = ""
    if isinstance(ids, Tensor) and ids.dim() == 1:
        inside = ", a single row: its input_ids have one dimension"
    elif _holds_more_than_text_and_numbers(batch):
        return
    elif isinstance(batch, (Mapping, tuple, list)) and batch:
        parts = map(repr, batch) if isinstance(batch, Mapping) else {type(value).__name__ for value in batch}
        inside = f", of {', '.join(parts):.150}, without a tensor"
    raise ValueError(
        "A batch is what the model is called with: a mapping of keyword arguments, a tuple or list of positional "
        f"ones, or one tensor. But this one is of type {type(batch).__name__}{inside}. Give a DataLoader whose "
        "collator makes batches of tensors, or say by `forward_fn` how the model takes them."
    )


def _holds_more_than_text_and_numbers(value: Any) -> bool:
    if isinstance(value, (Mapping, tuple, list)):
        return any(map(_holds_more_than_text_and_numbers, value.values() if isinstance(value, Mapping) else value))
    # Arrays and pictures say that they are some.
    return not (isinstance(value, (str, bytes, int, float, type(None))) or hasattr(value, "__array_interface__"))


def check_max_samples(max_samples: int | None) -> None:
    """Refuse what is no number of samples, with a `ValueError`; `None` is all."""
    if max_samples is not None and not (isinstance(max_samples, Integral) and max_samples >= 1):
        raise ValueError(f"`max_samples` must be a whole number of at least 1, but it is {max_samples!r}.")


def check_batches(batches: Any, max_samples: int | None, forward_fn: Any = None) -> None:
    """Refuse what is no collection of batches, a single one say, and what cannot be called, with a `ValueError`."""
    if forward_fn is not None and not callable(forward_fn):
        raise ValueError(f"`forward_fn` must be a function of the model and a batch, not {forward_fn!r}.")
    check_max_samples(max_samples)
    if isinstance(batches, (str, os.PathLike, Mapping, Tensor, nn.Module)) or not (
        hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    ):
        raise ValueError(
            f"Batches must be given as a DataLoader or a list, but this is a {type(batches).__name__}; put a single "
            "batch into a list."
        )
    if isinstance(batches, (list, tuple)) and forward_fn is None:
        for batch in batches:
            check_batch(batch)


def run_together(
    batches: Iterable[Any],
    max_samples: int | None,
    processes: Processes,
    run: Callable[[Any, bool], None],
    seen: Callable[[int], Any],
    sharded: bool = False,
) -> int:
    """Call `run(batch, True)` for each batch up to the one that reaches `max_samples` rows, over all processes.

    Where weights are `sharded`, each forward pass takes all processes. So all make equally many: where the data has
    ended before the others', a batch is repeated by `run(batch, False)`. `seen` is told how many rows are new; all
    together are returned.
    """
    source: Iterator[Any] | None = None
    batch: Any = None
    begun, ended, samples = False, False, 0

    def advance() -> int | None:
        """Get the next batch; its rows, `None` at the end."""
        nonlocal source, batch, ended
        if not ended:
            source = iter(batches) if source is None else source
            following = next(source, _END)
            ended = following is _END
            batch = batch if ended else following
        return None if ended else batch_size(batch)

    def lend() -> Any:
        return send_to_device(batch, "cpu")

    def run_once() -> None:
        run(batch, not ended)

    while max_samples is None or samples < max_samples:
        rows = processes.every(advance)
        if all(count is None for count in rows):
            break
        if not begun and None in rows:  # who has no data at all is lent a batch
            lent = processes.in_one(lend, next(index for index, count in enumerate(rows) if count is not None))
            batch = lent if ended else batch
        begun = True
        if sharded:
            run_once()  # if it fails in one process, to tell the others would mix with their forward passes
        else:
            processes.together(run_once)
        new = sum(filter(None, rows))
        samples += new
        seen(new)
    return samples


def batch_size(batch: Any) -> int:
    """Rows of a batch: the first dimension of its ids or mask, or else of its first tensor; or its length."""
    values: list[Any] = [batch]
    if isinstance(batch, Mapping):
        named = [batch[name] for name in ("input_ids", "inputs_embeds", *MASK_NAMES) if batch.get(name) is not None]
        values = [*named, *batch.values()]
    elif isinstance(batch, (tuple, list)):
        values = list(batch)
    rows = next((len(value) for value in values if isinstance(value, Tensor) and value.dim() > 0), None)
    if rows is None and isinstance(batch, (tuple, list)):  # rows that only `forward_fn` understands
        rows = len(batch) or 1
    return 1 if rows is None else rows
