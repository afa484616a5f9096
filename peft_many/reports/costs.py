"""What merging costs each task, before any evaluation: computed from a merge and its statistics alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..algebra.covariance import Covariance, know_traces
from ..algebra.devices import moved
from ..algebra.lpm import LeastSquaresMerge, LowRankDelta, MergedDelta
from ..algebra.residual import effective_ranks_of_inputs, effective_ranks_of_outputs, relative_residuals
from ..files.statistics import TaskStatistics, group_by_input
from ..files.stored_covariance import check_covariance
from ..merging.expected_routing import DrawnInputs
from ..records import ExpectedRouting, MergeRecord, most_telling

_LEAST, _MUCH = 0.1, 1 / 3  # of a residual that is worth naming, and of one that is called so
_AMOUNTS = ((2 / 3, "most"), (_MUCH, "much"), (_LEAST, "a little"), (-1.0, "hardly anything"))


@dataclass(frozen=True)
class MergeReport:
    """How well a merge does by each of its tasks; no model is run for it.

    Numbers of layers and tasks are NaN where a task did not train a layer, or no token of it reached the layer.

    Args:
        tasks (`list[str]`): In the order of the merge.
        layers (`list[str]`): The merged layers.
        residuals (`torch.Tensor`):
            `‖(ΔW* − ΔW_t) C_t^½‖ / ‖ΔW_t C_t^½‖`, shape `(layers, tasks)`: how far the merged delta's outputs on the
            task's inputs are from the task's own. 0 is as if alone, 1 as if the task's delta were lost. Of a merge
            with `gate_lora` these are of the merged LoRA, which undecided inputs get.
        conflicts (`torch.Tensor`, *optional*):
            Shape `(tasks, tasks)`: the mean over layers of the residual that the task of the row would have in a merge
            with the task of the column alone; the diagonal is NaN.
        output_ranks (`torch.Tensor`): Effective rank of `ΔW_t C_t^½`, shape `(layers, tasks)`.
        input_ranks (`torch.Tensor`): Effective rank of `C_t`, shape `(layers, tasks)`.
        routing (`dict[str, ExpectedRouting]`):
            By routed projector, where images of each task would be sent, were they Gaussian with the mean and
            covariance that were measured; and under `"gate_lora"` where the gates would send its inputs.
        weight_bytes (`int`): Size of the merged LoRA.
        statistics_bytes (`dict[str, int]`): By task, size of what merging further needs.
    """

    tasks: list[str]
    layers: list[str]
    residuals: Tensor
    conflicts: Tensor | None
    output_ranks: Tensor
    input_ranks: Tensor
    routing: dict[str, ExpectedRouting]
    weight_bytes: int
    statistics_bytes: dict[str, int]

    @property
    def interference(self) -> dict[str, float]:
        """By task, the mean residual over the layers that it trained."""
        return dict(zip(self.tasks, self.residuals.nanmean(0).tolist()))

    def doubts(self) -> list[str]:
        """Sentences that name the tasks which the routing can hardly tell apart."""
        return [line for name, found in most_telling(self.routing).items() for line in found.doubts(name)]

    def conflicting_pairs(self, count: int = 5) -> list[tuple[str, str, float]]:
        """The pairs of tasks that lose most by each other: the larger of their two losses, largest first."""
        if self.conflicts is None:
            return []
        pairs = [
            (one, two, max(self.conflicts[i, j].item(), self.conflicts[j, i].item()))
            for (i, one), (j, two) in itertools.combinations(enumerate(self.tasks), 2)
        ]
        return sorted(pairs, key=lambda pair: -pair[2])[:count]

    def conflicts_in_words(self) -> list[str]:
        """Sentences on the pairs of tasks that contradict each other."""
        pairs = self.conflicting_pairs()
        told = [
            f"'{one}' and '{two}' contradict each other{'' if lost >= _MUCH else ' a little'}: merged as a pair, one "
            f"loses {amount(lost)} ({lost:.3f})."
            for one, two, lost in pairs
            if lost >= _LEAST
        ]
        if pairs and not told:
            return [f"No two tasks contradict each other: merged as a pair, they lose {pairs[0][2]:.3f} at most."]
        return told

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON; NaN is `None`."""
        found = {one.name: _json(getattr(self, one.name)) for one in dataclasses.fields(self)}
        accuracy = {name: routed.accuracy for name, routed in self.routing.items()}
        derived = {"interference": _json(self.interference), "routing_accuracy": accuracy, "doubts": self.doubts()}
        return {**found, **derived}


def amount(residual: float) -> str:
    """A residual in words. The limits are round numbers: how much of it answers can bear differs between tasks."""
    return next(words for least, words in _AMOUNTS if not residual < least)


def _json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _json(value.tolist())
    if isinstance(value, ExpectedRouting):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_json(inner) for inner in value]
    return None if value != value else value


def report_on(
    merge: MergeRecord,
    tasks: Sequence[TaskStatistics],
    layers: Sequence[str],
    merged: Callable[[str], LowRankDelta],
    own: Callable[[int, str], LowRankDelta],
    *,
    conflicts: bool = True,
    device: torch.device | None = None,
    progress: bool = True,
) -> MergeReport:
    """Make the report of a merge from the deltas, scaling included, of its layers.

    `merged` gives the merged delta of a layer, and `own` that of a task, by its place, if it trained the layer. All
    is computed in float64 on the `device`, by default the CPU; a GPU is read once, but for the pairs. With `conflicts`
    the tasks are merged in pairs too, which takes about as long as merging all.
    """
    device = device or torch.device("cpu")
    shape, places = (len(layers), len(tasks)), {layer: place for place, layer in enumerate(layers)}

    def unknown(*shape: int) -> Tensor:  # filled where the numbers are made, and read once, at the end
        return torch.full(shape, torch.nan, dtype=torch.float64, device=device)

    residuals, output_ranks, input_ranks, pairs = (*(unknown(*shape) for _ in range(3)), unknown(*shape, len(tasks)))
    weight_bytes = 0
    with tqdm(total=len(layers), desc="Reporting", unit="layer", disable=not progress) as bar:
        for group in group_by_input(layers, [task.input_of for task in tasks]):
            covariances = _covariances(group[0], tasks, device)
            ranks = effective_ranks_of_inputs(list(covariances.values())) if covariances else ()
            trained: dict[str, dict[int, LowRankDelta]] = {}
            for layer in group:
                whole, row = merged(layer), places[layer]
                weight_bytes += whole.A.nbytes + whole.B.nbytes
                trained[layer] = {t: _on(device, own(t, layer)) for t in covariances if layer in tasks[t].lora_A}
                for t, rank in zip(covariances, ranks):
                    input_ranks[row, t] = rank
                for t, residual, rank in _costs(_on(device, whole), trained[layer], covariances):
                    residuals[row, t], output_ranks[row, t] = residual, rank
                bar.update()
            for s, t in itertools.combinations(covariances, 2) if conflicts else ():
                both = {s: covariances[s], t: covariances[t]}
                for layer, one, lost in _losses(trained, both, merge.options.ridge, device):
                    pairs[places[layer], one, t if one == s else s] = lost
    heard = {task.name or "": task for task in tasks if task.weight > 0}
    return MergeReport(
        tasks=[task.name or "" for task in tasks],
        layers=list(layers),
        residuals=residuals.cpu(),
        conflicts=pairs.nanmean(0).cpu() if conflicts else None,
        output_ranks=output_ranks.cpu(),
        input_ranks=input_ranks.cpu(),
        routing=DrawnInputs(merge.options, merge.routing, heard).expected,
        weight_bytes=weight_bytes,
        statistics_bytes={task.name or "": task.nbytes for task in tasks},
    )


def _covariances(layer: str, tasks: Sequence[TaskStatistics], device: torch.device) -> dict[int, Covariance]:
    """Those of the layer's input, by the places of the tasks that saw tokens there."""
    stored = {t: task.covariance_of(layer) for t, task in enumerate(tasks)}
    found = {t: covariance.on(device) for t, covariance in stored.items() if covariance is not None}
    know_traces(list(found.values()))  # which the checks would ask for one by one
    for t, covariance in found.items():
        check_covariance(covariance, f"'{tasks[t].name}': the covariance of '{layer}'")
    return {t: covariance for t, covariance in found.items() if tasks[t].tokens_of(layer) > 0}


def _on(device: torch.device, delta: LowRankDelta) -> LowRankDelta:
    return LowRankDelta(A=moved(delta.A, device), B=moved(delta.B, device))


def _costs(
    whole: LowRankDelta, own: Mapping[int, LowRankDelta], covariances: Mapping[int, Covariance]
) -> Iterable[tuple[int, Tensor, Tensor]]:
    """By task that trained a layer, its residual and the effective rank of its outputs."""
    if not own:
        return ()
    rank, exact = len(whole.A), whole.A.double()
    moments = [covariances[t].moment(torch.cat([exact, delta.A.double()])) for t, delta in own.items()]
    merged = MergedDelta(A=whole.A, B=whole.B, stacked=False, moments=moments)
    residuals = relative_residuals(merged, [(delta, covariances[t]) for t, delta in own.items()])
    ranks = effective_ranks_of_outputs(list(own.values()), [moment[rank:, rank:] for moment in moments])
    return zip(own, residuals, ranks)


def _losses(
    trained: Mapping[str, Mapping[int, LowRankDelta]],
    covariances: Mapping[int, Covariance],
    ridge: float | None,
    device: torch.device,
) -> Iterable[tuple[str, int, Tensor]]:
    """By layer and task that trained it, what each of two tasks loses in a merge of the two, with equal weights."""
    problem = LeastSquaresMerge(device=device) if ridge is None else LeastSquaresMerge(ridge, device)
    for t, covariance in covariances.items():
        problem.add(covariance, {layer: deltas[t] for layer, deltas in trained.items() if t in deltas})
    both = problem.solve(dtype=torch.float32) if any(t in own for own in trained.values() for t in covariances) else {}
    for layer, delta in both.items():
        own = [t for t in covariances if t in trained[layer]]
        lost = relative_residuals(delta, [(trained[layer][t], covariances[t]) for t in own])
        yield from zip(itertools.repeat(layer), own, lost)
