"""One layer's delta in an adapter's files: read and checked when the merge comes to it, not before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..algebra.devices import moved, numbers_of
from ..algebra.lpm import LowRankDelta
from .errors import UnmergeableAdapterError
from .fingerprints import fingerprint_there, same_weights
from .statistics import AdapterStatistics, TaskStatistics
from .tensor_file import TensorFile
from .tensor_keys import SHARDED, lora_key

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Reading:
    """A delta on its way to a device, and what tells whether it may be used: no GPU was waited for yet."""

    delta: LowRankDelta  # float32, the LoRA scaling folded into `A`
    numbers: Sequence[Tensor] = ()
    check: Callable[[Sequence[Sequence[float]]], None] = lambda numbers: None  # raises by the entries of `numbers`


@dataclass(frozen=True)
class StoredDelta:
    """Where one layer's delta of a task is, and how to read it: all is float32, the LoRA scaling folded into `A`."""

    shape: tuple[int, int]  # (out, in) of the layer
    rank: int
    start: Callable[[torch.device], Reading]
    rows: Callable[[], Tensor]  # `A` alone, unchecked
    columns: Callable[[], Tensor]  # `B` alone, unchecked

    def read(self) -> LowRankDelta:
        """The delta on the CPU, checked."""
        return checked(self.start(CPU))


def checked(reading: Reading) -> LowRankDelta:
    """A delta that may be used, or `UnmergeableAdapterError`."""
    reading.check(numbers_of(reading.numbers))
    return reading.delta


@dataclass(frozen=True)
class StoredPair:
    """The two LoRA tensors of one layer in a weights file, and the LoRA scaling."""

    weights: TensorFile
    module: str
    scaling: float

    def shape(self, half: str) -> tuple[int, ...]:
        return self.weights.shape(self.key(half))

    def read(self) -> LowRankDelta:
        return checked(self.start(CPU))

    def start(self, device: torch.device, block: slice = slice(None)) -> Reading:
        """Read the pair, or a block of it: rows of `A` and the columns of `B`. What moves is what is stored."""
        A = moved(self.weights[self.key("A")][block], device)
        B = moved(self.weights[self.key("B")][:, block], device)

        def check(totals: Sequence[Sequence[float]]) -> None:
            for half, (total,) in zip("AB", totals):
                check_total(total, f"{self.weights.path}: tensor '{self.key(half)}'")

        return Reading(LowRankDelta(A=self._scaled(A), B=B.float()), [total_of(A), total_of(B)], check)

    def rows(self) -> Tensor:
        return self._scaled(self.weights[self.key("A")])

    def columns(self) -> Tensor:
        return self.weights[self.key("B")].float()

    def _scaled(self, A: Tensor) -> Tensor:
        # Rounded to float32 here, so that a task taken from a merge, where it is stored so, is the same to the bit.
        return (self.scaling * A.double()).float()

    def key(self, half: str) -> str:
        """What one of the two is called in the file."""
        return lora_key(self.module, half)


def delta_of_adapter(pair: StoredPair, measured: TaskStatistics, name: str) -> StoredDelta:
    """The delta of an adapter that is no merge; `name` is the adapter's, for messages."""

    def start(device: torch.device) -> Reading:
        stored = pair.start(device)

        def check(numbers: Sequence[Sequence[float]]) -> None:
            stored.check(numbers)
            check_as_measured(measured, pair.module, numbers[-1], name)

        # Of a delta that is scaled to nothing, as it was before: zeros have no direction.
        A = stored.delta.A if pair.scaling else moved(pair.weights[pair.key("A")], device)
        fingerprint = fingerprint_there(A, stored.delta.B)
        return Reading(stored.delta, [*stored.numbers, fingerprint], check)

    rank, width = pair.shape("A")
    return StoredDelta((pair.shape("B")[0], width), rank, start, rows=pair.rows, columns=pair.columns)


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
            raise UnmergeableAdapterError(
                f"{adapter}: its weights and its statistics disagree on the ranks of '{module}': they are of "
                "different merges; save or download the merge again."
            )
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

    def start(device: torch.device) -> Reading:
        stored = pair.start(device, slice(None) if block is None else block)
        own = LowRankDelta(A=moved(A, device), B=stored.delta.B)
        if block is None:
            own = replace(own, B=moved(measured.lora_B[module], device))
        fingerprint = fingerprint_there(stored.delta.A, stored.delta.B)

        def check(numbers: Sequence[Sequence[float]]) -> None:
            *totals, own_A, own_B, found = numbers
            stored.check(totals)
            for half, (total,) in (("A", own_A), ("B", own_B)):
                check_total(total, f"{name}: the lora_{half} of '{module}' in the statistics")
            known = measured.fingerprints.get(module)
            if known is not None and not same_weights(known, found):
                raise UnmergeableAdapterError(
                    f"{name} was trained further after merging ('{module}' has changed), and its "
                    "statistics know nothing of that. Train task adapters, and merge those."
                )

        numbers = [*stored.numbers, total_of(own.A), total_of(own.B), fingerprint]
        return Reading(LowRankDelta(A=own.A.float(), B=own.B.float()), numbers, check)

    return StoredDelta((pair.shape("B")[0], A.shape[1]), A.shape[0], start, rows=A.float, columns=columns)


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
        raise UnmergeableAdapterError(
            f"{weights.path}: tensor '{key}' is {weights.dtype(key)}, but weights are floating-point numbers."
        )


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise `UnmergeableAdapterError` naming `where` if the tensor holds NaN or Inf."""
    if tensor.is_floating_point():
        check_total(total_of(tensor).item(), where)


def total_of(tensor: Tensor) -> Tensor:
    """Not finite if an entry is not, and several times faster than asking every entry."""
    return tensor.sum(dtype=torch.float64)


def check_total(total: float, where: str) -> None:
    """Raise `UnmergeableAdapterError` naming `where` if the total of a tensor is not finite."""
    if not math.isfinite(total):
        raise UnmergeableAdapterError(f"{where} holds NaN or Inf.")
