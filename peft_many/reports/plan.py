"""What a merge would be, and what it would take: nothing is merged and nothing is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..files.errors import StatisticsError, UnmergeableAdapterError
from ..hub.sources import AdapterNotFoundError, HubArguments
from ..merging.arguments import usable_device
from ..merging.prepare import AdapterPath, PreparedMerge, TaskNames, prepare_merge
from ..merging.selection import TaskWeights
from ..records import GATES, ExpectedRouting, MergeOptions, most_telling
from ..records.keywords import takes_merge_options
from ..records.options import BOTH, INSTRUCTIONS, ROUTED
from ..records.words import counted
from .inspection import TaskSummary, known_of

_FEW_SAMPLES = 32


@dataclass(frozen=True)
class MergePlan:
    """What a merge would be. With `problems` it cannot be made, and the rest is empty.

    Args:
        problems (`list[str]`): What has to be put right first.
        notes (`list[str]`): What is worth knowing before it is made.
        tasks (`list[TaskSummary]`): What would be merged, in the order of the merge.
        layers (`int`): How many layers the merge would adapt.
        groups (`int`): How many problems there are to solve: one for each input that layers share.
        ranks (`tuple[int, int]`): The smallest and largest rank of a merged layer.
        options (`dict[str, Any]`): Method, ridge, router and its options, rank, gate and dtype, defaults filled in.
        projectors (`dict[str, list[str]]`): By projector, the tasks that it is routed to, or that it is the mean of.
        routing (`dict[str, ExpectedRouting]`):
            By routed projector, and for gates under `"gate_lora"`, where inputs of the tasks are expected to go.
        output_bytes (`int`): Size of the weights file.
        multiplications (`float`): About how many it takes, in float64; other methods than LPM in proportion only.
    """

    problems: list[str]
    notes: list[str]
    tasks: list[TaskSummary]
    layers: int = 0
    groups: int = 0
    ranks: tuple[int, int] = (0, 0)
    options: dict[str, Any] | None = None
    projectors: dict[str, list[str]] | None = None
    routing: dict[str, ExpectedRouting] | None = None
    output_bytes: int = 0
    multiplications: float = 0.0


@takes_merge_options
def plan_merge(
    adapters: Sequence[AdapterPath],
    *,
    weights: TaskWeights = None,
    without: Sequence[str] = (),
    task_names: Sequence[TaskNames] | None = None,
    same_base: bool = False,
    device: str | torch.device = "cpu",
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    progress: bool = True,
    **options: Any,
) -> MergePlan:
    """Say what [`merge_adapter_files`] would make of the same arguments, and what stands in the way.

    Adapters are found (on the Hub: downloaded to its cache) and checked as for merging; weights are not read.

    Args:
        adapters (`Sequence[str]`): As in [`merge_adapter_files`], like all others.
        same_base (`bool`): Whether their base models are one, whatever they are called.
        device (`str`): Where it would be computed.
        token (`str` or `bool`, *optional*): As in [`~huggingface_hub.snapshot_download`], like the next two.
        cache_dir (`str`, *optional*): Where Hub downloads are kept.
        local_files_only (`bool`, defaults to `False`): Use only what is in the cache.
        progress (`bool`, defaults to `True`): Show a progress bar.
        **options: How to merge: those of [`MergeOptions`].

    Returns:
        [`MergePlan`]: What would be made, or the problems of every adapter.

    Raises:
        ValueError: An option is wrong.

    Example:

        ```py
        >>> from peft_many import plan_merge

        >>> plan = plan_merge(["iconqa", "clevr"], rank=4)
        >>> plan.problems, plan.ranks
        ([], (4, 4))
        ```
    """
    usable_device(device)
    chosen = MergeOptions(**options)
    about_tasks: dict[str, Any] = {"weights": weights, "without": without, "task_names": task_names}
    hub: HubArguments = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    expected = (AdapterNotFoundError, StatisticsError, UnmergeableAdapterError)
    try:
        prepared = prepare_merge(adapters, chosen, **about_tasks, hub=hub, progress=progress, same_base=same_base)
    except expected as error:
        problems = []
        for adapter in adapters:  # what is wrong with each by itself; if nothing is, they do not go together
            try:
                prepare_merge([adapter], chosen, hub=hub, progress=False)
            except expected as one:
                problems.append(str(one))
        return MergePlan(problems or [str(error)], [], [])
    ranks = [prepared.rank_of(layer) for layer in prepared.layers]
    return MergePlan(
        problems=[],
        notes=_notes(prepared),
        tasks=[TaskSummary(**known_of(task), source=task.source) for task in prepared.tasks],
        layers=len(ranks),
        groups=len(prepared.groups),
        ranks=(min(ranks), max(ranks)),
        options=prepared.options.describe(),
        projectors={**{name: routed.names for name, routed in prepared.routing.items()}, **prepared.averaged},
        routing=prepared.drawn_inputs.expected,
        output_bytes=sum(dtype.itemsize * math.prod(shape) for dtype, shape in prepared.tensors().values()),
        multiplications=sum(prepared.cost_of(group) for group in prepared.groups),
    )


def _notes(prepared: PreparedMerge) -> list[str]:
    """What may surprise in a merge that can be made."""
    notes = []
    layers, method = prepared.layers, prepared.options.merge_method
    needs_covariances = method is None or method.needs_covariances
    for task in prepared.tasks:
        missing = [module for module in layers if module not in task.deltas]
        silent = [module for module in missing if module not in task.statistics.input_of]
        if task.weight == 0:
            kept = "its LoRA is kept, its projector is not" if task.projectors else "its LoRA is kept"
            notes.append(f"'{task.name}' has weight 0, so it does not influence the merge; {kept}.")
        if missing:
            note = f"'{task.name}' did not train {len(missing)} of {len(layers)} layers ('{missing[0]}', …)"
            note += "; its delta counts as zero there."
            if silent and needs_covariances:
                note = (
                    note[:-1] + f", but in {len(silent)} of them nothing was measured, and the task is left out there."
                )
            notes.append(note)
        if 0 < task.statistics.samples < _FEW_SAMPLES:
            notes.append(
                f"'{task.name}' was measured on {counted(task.statistics.samples, 'sample')}; 32 to 128 are enough."
            )
        for projector in prepared.routing:
            if projector not in task.statistics.projectors:
                notes.append(f"'{task.name}' saw no image at '{projector}', so no image is sent to it.")
            elif projector not in task.projectors:
                notes.append(
                    f"'{task.name}' has no projector '{projector}' of its own: its images get the base model's."
                )
    told = most_telling(prepared.drawn_inputs.expected)
    doubts = [line for name, found in told.items() for line in found.doubts(name)]
    return [*notes, *doubts, *_better_gates(prepared)]


def _better_gates(prepared: PreparedMerge) -> list[str]:
    """What gates would reach that go by instructions, where the merge's own, if it has any, do not."""
    options, drawn = prepared.options, prepared.drawn_inputs
    possible = options.merge_method is None and options.projectors == ROUTED and options.rank is None
    if not possible or options.gate_by == BOTH or not drawn.have_instructions or len(drawn.tasks) < 2:
        return []
    now = drawn.expected[GATES].accuracy if options.gate_lora else 0.0
    kinds = [by for by in (INSTRUCTIONS, BOTH) if by != options.gate_by and (prepared.routing or by != BOTH)]
    reached = {by: drawn.gates(by).accuracy for by in kinds}
    best = max(reached, key=lambda by: reached[by], default=None)
    if best is None or reached[best] < now + 0.01:
        return []
    instead = f"instead of {100 * now:.0f} %" if options.gate_lora else "instead of one LoRA for all"
    share = f"{100 * reached[best]:.0f} % of a task's inputs"
    return [f"With `gate_by='{best}'` {share} are expected to get its own LoRA, {instead}."]
