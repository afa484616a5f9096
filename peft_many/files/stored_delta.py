"""One layer's delta in an adapter's files: read and checked when the merge comes to it, not before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.lpm import LowRankDelta
from .errors import AdapterFileError
from .fingerprints import same_weights, weight_fingerprint
from .statistics import AdapterStatistics, TaskStatistics
from .tensor_file import TensorFile

KEY_PREFIX = "base_model.model."
TASK_WEIGHT = "lora_A.task_weight"  # of a layer of a merge with `gate_lora`: the tasks' own `A_t`, stacked


class UnmergeableAdapterError(AdapterFileError):
    """An adapter cannot be merged; the message says which, where and why."""


@dataclass(frozen=True)
class StoredDelta:
    """Where one layer's delta of a task is, and how to read it; `read` checks what it reads.

    Args:
        shape (`tuple[int, int]`): `(out, in)` of the layer.
        rank (`int`): `r_t`.
        read (`Callable[[], LowRankDelta]`): Reads `A`, with the LoRA scaling folded in, and `B`; both float32.
        rows (`Callable[[], torch.Tensor]`): Reads that `A` alone, unchecked.
        columns (`Callable[[], torch.Tensor]`): Reads that `B` alone, unchecked.
    """

    shape: tuple[int, int]
    rank: int
    read: Callable[[], LowRankDelta]
    rows: Callable[[], Tensor]
    columns: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredPair:
    """The two LoRA tensors of one layer in a weights file, and the LoRA scaling."""

    weights: TensorFile
    module: str
    scaling: float

    def shape(self, half: str) -> tuple[int, ...]:
        return self.weights.shape(self._key(half))

    def read(self) -> LowRankDelta:
        for half in "AB":
            check_finite(self.weights[self._key(half)], f"{self.weights.path}: tensor '{self._key(half)}'")
        return LowRankDelta(A=self.rows(), B=self.columns())

    def rows(self) -> Tensor:
        # Rounded to float32 here, so that a task taken from a merge, where it is stored so, is the same to the bit.
        return (self.scaling * self.weights[self._key("A")].double()).float()

    def columns(self) -> Tensor:
        return self.weights[self._key("B")].float()

    def _key(self, half: str) -> str:
        return f"{KEY_PREFIX}{self.module}.lora_{half}.weight"


def delta_of_adapter(pair: StoredPair, measured: TaskStatistics, module: str, name: str) -> StoredDelta:
    """The delta of an adapter that is no merge; `name` is the adapter's, for messages."""

    def read() -> LowRankDelta:
        delta = pair.read()
        if not _is_as_measured(measured, module, delta):
            raise UnmergeableAdapterError(
                f"{name} was trained further after its statistics were collected ('{module}' has changed); "
                "run `collect_statistics` again."
            )
        return delta

    rank, width = pair.shape("A")
    return StoredDelta((pair.shape("B")[0], width), rank, read, rows=pair.rows, columns=pair.columns)


def _is_as_measured(measured: TaskStatistics, module: str, weights: LowRankDelta) -> bool:
    fingerprint = measured.fingerprints.get(module)
    return fingerprint is None or same_weights(fingerprint, weight_fingerprint(weights.A, weights.B))


def deltas_in_merge(
    adapter: str, pairs: Mapping[str, StoredPair], statistics: AdapterStatistics
) -> list[dict[str, StoredDelta]]:
    """The deltas of each task of a merge, by layer.

    The statistics hold every `A_t`; the `B_t` are blocks of columns of the merged `B`, or are in the statistics too.

    Args:
        adapter (`str`): The merge's name, for messages.
        pairs (`Mapping[str, StoredPair]`): The merged LoRA by layer.
        statistics ([`AdapterStatistics`]): Of its tasks.

    Raises:
        UnmergeableAdapterError: Weights and statistics disagree.
    """
    ends = dict.fromkeys(pairs, 0)  # of the columns that tasks have taken so far
    unstacked = {module for task in statistics.tasks for module in task.lora_B if module in task.lora_A}
    found = []
    for task in statistics.tasks:
        deltas = {}
        for module, A in task.lora_A.items():
            pair, own = pairs.get(module), task.lora_B.get(module)
            if (
                pair is None
                or A.shape[1] != pair.shape("A")[1]
                or (module in unstacked) != (own is not None)
                or (own is not None and tuple(own.shape) != (pair.shape("B")[0], A.shape[0]))
            ):
                raise _disagreement(adapter, module)
            block = slice(ends[module], ends[module] + A.shape[0]) if own is None else None
            ends[module] = pair.shape("A")[0] if block is None else block.stop
            deltas[module] = _delta_in_merge(pair, task, module, block, f"{adapter}, task '{task.name}'")
        found.append(deltas)
    wrong = next((module for module, pair in pairs.items() if ends[module] != pair.shape("A")[0]), None)
    if wrong is not None:
        raise _disagreement(adapter, wrong)
    return found


def _disagreement(adapter: str, module: str) -> UnmergeableAdapterError:
    return UnmergeableAdapterError(f"{adapter}: its weights and its statistics disagree on '{module}'.")


def _delta_in_merge(
    pair: StoredPair, measured: TaskStatistics, module: str, block: slice | None, name: str
) -> StoredDelta:
    """A task's delta; `block` says which part of the merged pair is the task's, if one is."""
    A = measured.lora_A[module]

    def columns() -> Tensor:
        return measured.lora_B[module].float() if block is None else pair.columns()[:, block]

    def read() -> LowRankDelta:
        merged, B = pair.read(), columns()
        stored = merged if block is None else LowRankDelta(A=merged.A[block], B=B)
        for half, tensor in (("A", A), ("B", B)):
            check_finite(tensor, f"{name}: the lora_{half} of '{module}' in the statistics")
        if not _is_as_measured(measured, module, stored):
            raise UnmergeableAdapterError(
                f"{name} was trained further after merging ('{module}' has changed), and its "
                "statistics know nothing of that. Train task adapters, and merge those."
            )
        return LowRankDelta(A=A.float(), B=B)

    return StoredDelta((pair.shape("B")[0], A.shape[1]), A.shape[0], read, rows=A.float, columns=columns)


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise `UnmergeableAdapterError` naming `where` if the tensor holds NaN or Inf."""
    # A sum is not finite if an entry is not, and is several times faster than asking every entry.
    if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
        raise UnmergeableAdapterError(f"{where} holds NaN or Inf.")
