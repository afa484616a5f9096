"""Reading what one group of layers needs: everything is checked, and on the device that the group is merged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..algebra.covariance import Covariance, know_traces
from ..algebra.devices import numbers_of
from ..algebra.lpm import LowRankDelta
from ..files.stored_covariance import check_covariance
from .prepare import PreparedMerge


@dataclass(frozen=True)
class GroupInputs:
    """Layers that share their input, and by task what they are merged from; all that a task did not train is left out.

    On a CPU covariances are mapped from their files, deltas are float32. On a GPU all is there, covariances as stored.
    """

    layers: Sequence[str]
    covariances: Sequence[Covariance | None]  # of the shared input, `None` where it was not measured
    deltas: Sequence[Mapping[str, LowRankDelta]]  # by layer
    device: torch.device


def read_group(prepared: PreparedMerge, layers: Sequence[str], device: torch.device) -> GroupInputs:
    """Read a group. A GPU is waited for twice: for the numbers by which deltas are checked, and for the traces."""
    method = prepared.options.merge_method
    needs_covariances = method is None or method.needs_covariances
    measured = [task.statistics.covariance_of(layers[0]) for task in prepared.tasks]
    covariances = [covariance and covariance.on(device) for covariance in measured]
    started = [
        {layer: task.deltas[layer].start(device) for layer in layers if layer in task.deltas}
        for task in prepared.tasks
    ]
    numbers = iter(numbers_of([one for own in started for reading in own.values() for one in reading.numbers]))
    if needs_covariances:
        know_traces([covariance for covariance in covariances if covariance is not None])
    for task, covariance, own in zip(prepared.tasks, covariances, started):
        if covariance is not None and needs_covariances:
            check_covariance(covariance, f"{task.source}: the covariance of '{layers[0]}'")
        for reading in own.values():
            reading.check([next(numbers) for _ in reading.numbers])
    deltas = [{layer: reading.delta for layer, reading in own.items()} for own in started]
    return GroupInputs(layers, covariances, deltas, device)
