"""What several processes measured, each on its own share of the data, brought together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.covariance import Covariance, LowRankCovariance, mean_covariance
from ..algebra.spectrum import eigen_directions
from ..algebra.spread import centred
from ..files.processes import from_every_process
from .prototype_hooks import PooledFeatures

# Directions in which the spread of a task's images is kept.
LARGEST_SPREAD = 256


def gather_covariances(
    found: Mapping[str, Covariance], finish: Callable[[Covariance, list[str]], Covariance], several: bool
) -> dict[str, Covariance]:
    """The covariances over all processes, one input at a time, so that no process holds the others' all at once.

    Layers share one object if they did in every process where a token reached them. Where an input was sketched, each
    process followed directions of its own; the sum is as accurate as the least accurate part.

    Args:
        found (`Mapping[str, Covariance]`): What this process measured, by layer.
        finish (`Callable`): Makes the covariance to keep out of the sum and the layers' names.
        several (`bool`): Whether there are other processes, which then all make this call.

    Returns:
        `dict[str, Covariance]`: The same in every process, in the order of `found`.
    """
    gather = from_every_process if several else _alone
    everyone = gather({name: (id(c), c.tokens) for name, c in found.items()})
    known = list(dict.fromkeys(name for one in everyone for name in one))
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in known:
        seen = tuple(one[name][0] if one.get(name, (0, 0))[1] > 0 else None for one in everyone)
        groups.setdefault(seen if any(seen) else (name,), []).append(name)
    result: dict[str, Covariance] = {}
    for names in groups.values():
        parts = [part for part in gather(next((found[name] for name in names if name in found), None)) if part]
        covariance = parts[0] if len(parts) == 1 else mean_covariance(parts)
        result |= dict.fromkeys(names, finish(covariance, names))
    return {name: result[name] for name in known}


@dataclass(frozen=True)
class ImageStatistics:
    """What is known of a task's images, by projector.

    Args:
        prototypes (`dict[str, torch.Tensor]`): The mean of their pooled features, shape `(d,)`, float32.
        spreads (`dict[str, LowRankCovariance]`): Their covariance about that mean, if there are two images or more.
        images (`int`): How many there were.
    """

    prototypes: dict[str, Tensor]
    spreads: dict[str, LowRankCovariance]
    images: int


def gather_prototypes(found: Mapping[str, PooledFeatures], several: bool) -> ImageStatistics:
    """The images of all processes together.

    Args:
        found (`Mapping[str, PooledFeatures]`): What this process measured, by projector.
        several (`bool`): As in `gather_covariances`.
    """
    everyone = (from_every_process if several else _alone)(dict(found))
    prototypes, spreads, images = {}, {}, 0
    for name in dict.fromkeys(name for one in everyone for name in one):
        parts = [one[name] for one in everyone if name in one]
        count = sum(part.images for part in parts)
        prototypes[name] = (torch.stack([part.total for part in parts]).sum(0) / count).float()
        rows = torch.cat([kept for part in parts for kept in part.kept])
        if len(rows) > 1:
            spreads[name] = eigen_directions(centred(rows)).keep(LARGEST_SPREAD).in_half_precision()
        images = max(images, count)
    return ImageStatistics(prototypes, spreads, images)


def _alone(value: Any) -> list[Any]:
    return [value]
