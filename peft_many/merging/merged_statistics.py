"""The statistics of a merge: its tasks' own, with their deltas, so that it can be merged further without them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..files.planned_tensors import Planned, PlannedTensors, written_meanwhile
from ..files.statistics import COVARIANCE, STATISTICS_NAME, AdapterStatistics
from ..files.stored_delta import StoredDelta
from .group import LayerRecord
from .prepare import PreparedMerge

# Room for a fingerprint in a file's header, before it is known: what floats take there at most.
_WIDEST_FINGERPRINT = [-2.2250738585072014e-308] * 9


def merged_statistics(
    prepared: PreparedMerge, layers: Mapping[str, LayerRecord], in_memory: bool = False
) -> AdapterStatistics:
    """Each task's statistics with its deltas, which are read now (`in_memory`) or each time they are asked for."""
    measured = []
    for task in prepared.tasks:
        A = PlannedTensors({module: _rows(delta) for module, delta in task.deltas.items()})
        B = PlannedTensors(
            {module: _columns(delta) for module, delta in task.deltas.items() if not layers[module].stacked}
        )
        measured.append(
            replace(
                task.statistics,
                name=task.name,
                weight=task.weight,
                lora_A=dict(A) if in_memory else A,
                lora_B=dict(B) if in_memory else B,
                fingerprints={module: layers[module].fingerprints[task.name] for module in task.deltas},
            )
        )
    return AdapterStatistics(tuple(measured))


@contextlib.contextmanager
def statistics_copied_meanwhile(
    prepared: PreparedMerge, folder: Path
) -> Iterator[Callable[[Mapping[str, LayerRecord]], None]]:
    """Copy the tasks' covariances into a merge's statistics file, its largest part, while the block merges.

    The block gets what completes the file, which is told what is recorded of the layers. What the file will be is
    guessed before: that all layers have the tasks' `B` side by side.
    """
    unknown = LayerRecord(True, {task.name: _WIDEST_FINGERPRINT for task in prepared.tasks}, {})
    guess = merged_statistics(prepared, dict.fromkeys(prepared.layers, unknown)).plan()
    with written_meanwhile(
        guess, folder / STATISTICS_NAME, prepared.files, lambda key: key.split(".")[1] == COVARIANCE
    ) as complete:
        yield lambda records: complete(merged_statistics(prepared, records).plan())


def _rows(delta: StoredDelta) -> Planned:
    return Planned(torch.float32, (delta.rank, delta.shape[1]), delta.rows)


def _columns(delta: StoredDelta) -> Planned:
    return Planned(torch.float32, (delta.shape[0], delta.rank), delta.columns)
