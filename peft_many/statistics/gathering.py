"""What several processes measured, each on its own share of the data, brought together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..algebra.covariance import Covariance
from ..algebra.spectrum import Truncation
from ..algebra.spread import centred
from ..files.statistics import ImageStatistics, InputStatistics
from .images import PooledFeatures
from .inputs import MeasuredInputs, added_inputs

Gather = Callable[[Any], list[Any]]


def alone(value: Any) -> list[Any]:
    """What all processes pass where there is this one."""
    return [value]


# How much is kept of the spread of a task's images.
SPREAD = Truncation(rank=256, energy=1.0)


def gather_inputs(
    found: MeasuredInputs, finish: Callable[[Covariance, list[str]], Covariance], gather: Gather
) -> MeasuredInputs:
    """The inputs over all processes, one at a time, so that no process holds the others' all at once.

    Layers share an input if they did in every process where a token reached them. Where an input was sketched, each
    process followed directions of its own; the sum is as accurate as the least accurate part. `finish` makes the
    covariance to keep out of the sum and the layers' names; `gather` gives what all processes pass, which then all
    make this call and get the same, with layers in the order of `found`.
    """
    everyone = gather({name: key if found.inputs[key].tokens else None for name, key in found.input_of.items()})
    known = list(dict.fromkeys(name for one in everyone for name in one))
    groups: dict[tuple[str | None, ...] | str, list[str]] = {}
    for name in known:
        seen = tuple(one.get(name) for one in everyone)
        groups.setdefault(seen if any(seen) else name, []).append(name)
    inputs: dict[str, InputStatistics] = {}
    input_of: dict[str, str] = {}
    for names in groups.values():
        own = next((found.inputs[found.input_of[name]] for name in names if name in found.input_of), None)
        total = added_inputs([part for part in gather(own) if part is not None])
        inputs[names[0]] = InputStatistics(finish(total.covariance, names), total.tokens)
        input_of |= dict.fromkeys(names, names[0])
    return MeasuredInputs(inputs, {name: input_of[name] for name in known})


def gather_images(found: Mapping[str, PooledFeatures], gather: Gather) -> dict[str, ImageStatistics]:
    """The images of all processes together, by projector; arguments as in `gather_inputs`."""
    everyone = gather(dict(found))
    gathered = {}
    for name in dict.fromkeys(name for one in everyone for name in one):
        parts = [one[name] for one in everyone if name in one]
        images = sum(part.images for part in parts)
        prototype = (torch.stack([part.total for part in parts]).sum(0) / images).float()
        rows = torch.cat([kept for part in parts for kept in part.kept])
        gathered[name] = ImageStatistics(prototype, SPREAD.apply(centred(rows)) if len(rows) > 1 else None, images)
    return gathered
