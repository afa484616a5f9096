"""What several processes measured, each on its own share of the data, brought together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..algebra.covariance import Covariance
from ..algebra.devices import float64_device
from ..algebra.lpm import LowRankDelta
from ..algebra.spectrum import Truncation
from ..files.processes import Processes
from ..files.statistics import InputStatistics, group_by_input
from .inputs import MeasuredInputs, added_inputs


def kept(
    truncation: Truncation, deltas: Mapping[str, LowRankDelta], covariance: Covariance, layers: Sequence[str]
) -> Covariance:
    """What is kept of the covariance of the layers' input; an error budget is one of the adapter's deltas."""
    return truncation.apply(covariance, [deltas[name] for name in layers if name in deltas])


def gather_inputs(
    found: MeasuredInputs,
    finish: Callable[[Covariance, list[str]], Covariance],
    processes: Processes,
    device: torch.device | str = "cpu",
) -> MeasuredInputs:
    """The inputs over all processes, one at a time, so that no process holds the others' all at once.

    Layers share an input if they did in every process where a token reached them. Where an input was sketched, each
    process followed directions of its own; the sum is as accurate as the least accurate part. `finish` makes the
    covariance to keep out of the sum and the layers' names, where a single process measured it, and else on the
    `device`. All processes get the same, with layers in the order of `found`.
    """
    seen_here = {name: key if found.inputs[key].tokens else None for name, key in found.input_of.items()}
    everyone = processes.every(lambda: seen_here)
    known = list(dict.fromkeys(name for one in everyone for name in one))
    groups = group_by_input(known, everyone)

    def gathered(names: list[str]) -> InputStatistics:
        own = next((found.inputs[found.input_of[name]] for name in names if name in found.input_of), None)
        if processes.count > 1:  # others have no use for this one's devices
            own = own and replace(own, covariance=own.covariance.on(torch.device("cpu")))
        total = added_inputs([part for part in processes.every(lambda: own) if part is not None])
        summed = total.covariance if processes.count == 1 else total.covariance.on(float64_device(device))
        return InputStatistics(processes.together(lambda: finish(summed, names)), total.tokens)

    inputs = {names[0]: gathered(names) for names in groups}
    input_of = {name: names[0] for names in groups for name in names}
    return MeasuredInputs(inputs, {name: input_of[name] for name in known})
