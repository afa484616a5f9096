"""Merging the layers of one group, which share their input."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..algebra.devices import fetched, numbers_of
from ..algebra.lpm import LeastSquaresMerge, MergedDelta, SingularMergeError
from ..algebra.residual import relative_residuals
from ..algebra.scatter import slices
from ..files.errors import UnmergeableAdapterError
from ..files.fingerprints import FINGERPRINT_LENGTH, fingerprint_there
from ..files.tensor_keys import KEY_PREFIX, TASK_WEIGHT, lora_key
from ..records.words import counted
from .by_method import merge_by_method
from .overlap import overlapped
from .prepare import PreparedMerge
from .reading import GroupInputs, read_group

# Groups that are read before their turn, and as many that wait to be written, by kind of device.
GROUPS_AHEAD = {"cpu": 1, "cuda": 3}


@dataclass(frozen=True)
class LayerRecord:
    """What the merge's statistics and its config say of a merged layer."""

    stacked: bool  # as in `MergedDelta`
    fingerprints: dict[str, list[float]]  # by task that trained it, of its block of the merged weights
    residuals: dict[str, float]  # what merging costs each task that trained it


def merge_groups(
    prepared: PreparedMerge,
    groups: Sequence[Sequence[str]],
    write: Callable[[dict[str, Tensor]], None],
    device: torch.device,
    progress: bool,
) -> dict[str, LayerRecord]:
    """Merge groups of layers; the next ones are read and the last ones written, each in a thread, meanwhile.

    What is written are tensors for the weights file, by key; what comes back is to be recorded, by layer.

    On a CPU one group is read ahead and one waits to be written, on a GPU three and three ([`overlapped`]). A group
    that was read takes what the files hold of it, deltas in float32, and one that is merged its share of the weights
    file. The one that is worked on takes 8 bytes for each entry of its tasks' factors and of their Gram matrix
    besides. Of six tasks of LLaVA-1.5-7B's size and its widest inputs these are 40 MB, 6 MB and 0.2 GB.
    """
    records: dict[str, LayerRecord] = {}

    def work(inputs: GroupInputs) -> dict[str, Tensor]:
        tensors, of_group = merge_group(prepared, inputs)
        records.update(of_group)
        return tensors

    done = overlapped(
        groups,
        lambda group: read_group(prepared, group, device),
        work,
        write,
        GROUPS_AHEAD.get(device.type, GROUPS_AHEAD["cpu"]),
    )
    label = f"Merging {counted(len(prepared.tasks), 'task')}"
    with (
        contextlib.closing(done),
        tqdm(total=sum(map(len, groups)), desc=label, unit="layer", disable=not progress) as bar,
    ):
        for group in done:
            bar.update(len(group))
    return records


def merge_group(prepared: PreparedMerge, inputs: GroupInputs) -> tuple[dict[str, Tensor], dict[str, LayerRecord]]:
    """Merge layers that share their input: their tensors for the weights file, by key, and their records, by layer.

    Everything is computed on the device of the inputs, comes back once, in the dtype in which it is stored, and is
    there when all numbers of the record are, which are asked for at once.
    """
    merged = merged_deltas(prepared, inputs)
    tensors = tensors_of(merged)
    asked = [
        number
        for module, delta in merged.items()
        for number in (_fingerprints(inputs, module, delta), _residuals(inputs, module, delta))
    ]
    numbers = iter(numbers_of(asked))
    records = {}
    for module, delta in merged.items():
        names = [task.name for task, own in zip(prepared.tasks, inputs.deltas) if module in own]
        found = iter(next(numbers))
        fingerprints = {name: list(itertools.islice(found, FINGERPRINT_LENGTH)) for name in names}
        shares = dict(zip(names, next(numbers)))
        known = {name: share for name, share in shares.items() if not math.isnan(share)}
        records[module] = LayerRecord(delta.stacked, fingerprints, known)
    prepared.release()
    return tensors, records


def merged_deltas(prepared: PreparedMerge, inputs: GroupInputs) -> dict[str, MergedDelta]:
    """The merged delta of each layer of a group; an error names the group's first layer."""
    merge = _merge_by_lpm if prepared.options.merge_method is None else merge_by_method
    try:
        return merge(prepared, inputs)
    except (SingularMergeError, OverflowError) as error:
        raise UnmergeableAdapterError(f"'{inputs.layers[0]}' cannot be merged: {error}.") from None


def tensors_of(merged: Mapping[str, MergedDelta]) -> dict[str, Tensor]:
    """Merged deltas, by layer, as a weights file holds them, on the CPU; of a GPU's, see `fetched`."""
    tensors = {}
    for module, delta in merged.items():
        for half, tensor in (("A", delta.A), ("B", delta.B)):
            tensors[lora_key(module, half)] = fetched(tensor.contiguous())
        if delta.task_A is not None:
            tensors[f"{KEY_PREFIX}{module}.{TASK_WEIGHT}"] = fetched(delta.task_A.contiguous())
    return tensors


def _merge_by_lpm(prepared: PreparedMerge, inputs: GroupInputs) -> dict[str, MergedDelta]:
    options = prepared.options
    assert options.ridge is not None
    problem = LeastSquaresMerge(options.ridge, inputs.device)
    for task, covariance, deltas in zip(prepared.tasks, inputs.covariances, inputs.deltas):
        if covariance is not None:
            problem.add(covariance, deltas, task.weight)
    return problem.solve(options.rank, options.dtype, bool(options.gate_lora))


def _fingerprints(inputs: GroupInputs, module: str, merged: MergedDelta) -> Tensor:
    """Of each task's block of the merged weights, or of all of them where they have no blocks, `(tasks, 9)`."""
    ranks = [len(deltas[module].A) for deltas in inputs.deltas if module in deltas]
    if not merged.stacked:
        return fingerprint_there(merged.A, merged.B).expand(len(ranks), -1)
    if len(set(ranks)) == 1:  # a GPU takes them together
        shape = (len(ranks), ranks[0], -1)
        return fingerprint_there(merged.A.reshape(shape), merged.B.T.reshape(shape).mT)
    blocks = [fingerprint_there(merged.A[block], merged.B[:, block]) for block in slices(ranks)]
    return torch.stack(blocks)


def _residuals(inputs: GroupInputs, module: str, merged: MergedDelta) -> Tensor:
    trained = [(own[module], of) for own, of in zip(inputs.deltas, inputs.covariances) if module in own]
    return relative_residuals(merged, trained)


def mean_residuals(records: Mapping[str, LayerRecord]) -> dict[str, float]:
    """By task the mean over layers of what merging costs it; four digits are kept."""
    by_task: dict[str, list[float]] = {}
    for record in records.values():
        for task, residual in record.residuals.items():
            by_task.setdefault(task, []).append(residual)
    return {task: float(f"{math.fsum(found) / len(found):.4g}") for task, found in by_task.items()}
