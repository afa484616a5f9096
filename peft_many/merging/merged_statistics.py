"""The statistics of a merge: its tasks' own, with their deltas, so that it can be merged further without them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..files.fingerprints import NO_FINGERPRINT
from ..files.planned_tensors import Planned, PlannedTensors, written_meanwhile
from ..files.statistics import COVARIANCE, STATISTICS_NAME, AdapterStatistics
from ..files.stored_delta import StoredDelta
from .group import LayerRecord
from .prepare import PreparedMerge


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

    The block gets what completes the file, which is told what is recorded of the layers. Which of them will have the
    tasks' `B` side by side, and the file no `B` of theirs, is guessed before; only LPM's can be.
    """
    prints = {task.name: list(NO_FINGERPRINT) for task in prepared.tasks}
    guess = {layer: LayerRecord(_keeps_blocks(prepared, layer), prints, {}) for layer in prepared.layers}
    by_lpm = prepared.options.merge_method is None
    with written_meanwhile(
        merged_statistics(prepared, guess).plan(),
        folder / STATISTICS_NAME,
        prepared.files,
        lambda key: by_lpm and key.split(".")[1] == COVARIANCE,
    ) as complete:
        yield lambda records: complete(merged_statistics(prepared, records).plan())


def _keeps_blocks(prepared: PreparedMerge, layer: str) -> bool:
    """Whether LPM gives the tasks' `B` back, but where large blocks cancel."""
    whole = prepared.rank_of(layer) == sum(prepared.ranks_of(layer))
    return whole and prepared.options.dtype == torch.float32


def _rows(delta: StoredDelta) -> Planned:
    return Planned(torch.float32, (delta.rank, delta.shape[1]), delta.rows)


def _columns(delta: StoredDelta) -> Planned:
    return Planned(torch.float32, (delta.shape[0], delta.rank), delta.columns)
