"""One layer's delta in an adapter's files: read and checked when the merge comes to it, not before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.lpm import LowRankDelta
from .errors import UnmergeableAdapterError
from .fingerprints import same_weights, weight_fingerprint
from .statistics import AdapterStatistics, TaskStatistics
from .tensor_file import TensorFile
from .tensor_keys import KEY_PREFIX, SHARDED


@dataclass(frozen=True)
class StoredDelta:
    """Where one layer's delta of a task is, and how to read it: all is float32, the LoRA scaling folded into `A`."""

    shape: tuple[int, int]  # (out, in) of the layer
    rank: int
    read: Callable[[], LowRankDelta]  # checks what it reads
    rows: Callable[[], Tensor]  # `A` alone, unchecked
    columns: Callable[[], Tensor]  # `B` alone, unchecked


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


def delta_of_adapter(pair: StoredPair, measured: TaskStatistics, name: str) -> StoredDelta:
    """The delta of an adapter that is no merge; `name` is the adapter's, for messages."""

    def read() -> LowRankDelta:
        delta = pair.read()
        check_as_measured(measured, pair.module, weight_fingerprint(delta.A, delta.B), name)
        return delta

    rank, width = pair.shape("A")
    return StoredDelta((pair.shape("B")[0], width), rank, read, rows=pair.rows, columns=pair.columns)


def check_as_measured(measured: TaskStatistics, module: str, fingerprint: Sequence[float], name: str) -> None:
    """Raise `UnmergeableAdapterError` if an adapter's layer was trained further after it was measured."""
    known = measured.fingerprints.get(module)
    if known is not None and not same_weights(known, fingerprint):
        raise trained_further(name, module)


def trained_further(name: str, module: str) -> UnmergeableAdapterError:
    """The error for an adapter that is no longer what was measured."""
    return UnmergeableAdapterError(
        f"{name} was trained further after its statistics were collected ('{module}' has changed); run "
        "`collect_statistics` again."
    )


def deltas_in_merge(
    adapter: str, pairs: Mapping[str, StoredPair], statistics: AdapterStatistics
) -> list[dict[str, StoredDelta]]:
    """The deltas of each task of a merge, by layer; `pairs` are the merged LoRA.

    The statistics hold every `A_t`; the `B_t` are blocks of columns of the merged `B`, or are in the statistics too.
    """
    for module in dict.fromkeys([*pairs, *(module for task in statistics.tasks for module in task.lora_A)]):
        if module not in pairs or not _fits(pairs[module], [t for t in statistics.tasks if module in t.lora_A]):
            raise UnmergeableAdapterError(f"{adapter}: its weights and its statistics disagree on '{module}'.")
    return [
        {
            module: _delta_in_merge(pairs[module], statistics, t, f"{adapter}, task '{task.name}'")
            for module in task.lora_A
        }
        for t, task in enumerate(statistics.tasks)
    ]


def _fits(pair: StoredPair, tasks: Sequence[TaskStatistics]) -> bool:
    """Whether the parts of these tasks make up a merged pair, or all tasks have whole ones of their own."""
    (rank, width), out = pair.shape("A"), pair.shape("B")[0]
    A = [task.lora_A[pair.module] for task in tasks]
    B = [task.lora_B[pair.module] for task in tasks if pair.module in task.lora_B]
    if any(part.shape[1] != width for part in A):
        return False
    return [part.shape for part in B] == [(out, len(part)) for part in A] if B else sum(map(len, A)) == rank


def _delta_in_merge(pair: StoredPair, statistics: AdapterStatistics, t: int, name: str) -> StoredDelta:
    measured, module = statistics.tasks[t], pair.module
    A, block = measured.lora_A[module], statistics.columns_of(t, module)

    def columns() -> Tensor:
        return measured.lora_B[module].float() if block is None else pair.columns()[:, block]

    def read() -> LowRankDelta:
        merged, B = pair.read(), columns()
        stored = merged if block is None else LowRankDelta(A=merged.A[block], B=B)
        for half, tensor in (("A", A), ("B", B)):
            check_finite(tensor, f"{name}: the lora_{half} of '{module}' in the statistics")
        known = measured.fingerprints.get(module)
        if known is not None and not same_weights(known, weight_fingerprint(stored.A, stored.B)):
            raise UnmergeableAdapterError(
                f"{name} was trained further after merging ('{module}' has changed), and its "
                "statistics know nothing of that. Train task adapters, and merge those."
            )
        return LowRankDelta(A=A.float(), B=B)

    return StoredDelta((pair.shape("B")[0], A.shape[1]), A.shape[0], read, rows=A.float, columns=columns)


def check_whole(weights: TensorFile, key: str) -> None:
    """Raise `UnmergeableAdapterError` if a tensor of a module that was saved whole cannot be one."""
    where, shape = f"{weights.path}: tensor '{key}'", weights.shape(key)
    if 0 in shape and not key.endswith(".directions"):  # a merge's router may know of none
        raise UnmergeableAdapterError(f"{where} is empty, of shape {shape}: {SHARDED}.")
    if key.endswith((".weight", ".bias")):
        check_floating(weights, key)
    check_finite(weights[key], where)


def check_floating(weights: TensorFile, key: str) -> None:
    """Raise `UnmergeableAdapterError` if a weight is none by its dtype."""
    if not weights.dtype(key).is_floating_point:
        raise UnmergeableAdapterError(f"{weights.path}: tensor '{key}' is {weights.dtype(key)}, and no weight.")


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise `UnmergeableAdapterError` naming `where` if the tensor holds NaN or Inf."""
    # A sum is not finite if an entry is not, and is several times faster than asking every entry.
    if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
        raise UnmergeableAdapterError(f"{where} holds NaN or Inf.")
