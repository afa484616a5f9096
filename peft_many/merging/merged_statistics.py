"""The statistics of a merge: its tasks' own, with their deltas, so that it can be merged further without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from ..files.statistics import AdapterStatistics
from .group import LayerRecord
from .prepare import PreparedMerge


def merged_statistics(
    prepared: PreparedMerge, layers: Mapping[str, LayerRecord], in_memory: bool = False
) -> AdapterStatistics:
    """Each task's statistics with its deltas, which are read now (`in_memory`) or each time they are asked for."""
    measured = []
    for task in prepared.tasks:
        A = _Reading({module: delta.rows for module, delta in task.deltas.items()})
        B = _Reading({module: delta.columns for module, delta in task.deltas.items() if not layers[module].stacked})
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


class _Reading(Mapping[str, Tensor]):
    """Tensors that are read each time they are asked for, so that no two of them need be in memory."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)
