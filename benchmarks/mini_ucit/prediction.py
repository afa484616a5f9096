"""Does the residual, which needs no evaluation, tell what a merge will lose? Both, of merges of several kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft_many.reports.report import merge_report

from .methods import Measured, Measurement, Method, lpm_own_projector, merge_folder
from .workshop import Workshop

RESIDUAL, ACCURACY = "residual, % of the outputs", "merged LoRA, own projector"
MERGES: Mapping[str, dict[str, Any]] = {
    "LPM": {},
    "LPM, λ = 0.01": {"ridge": 1e-2},
    "LPM, λ = 0.1": {"ridge": 1e-1},
    "LPM, λ = 1": {"ridge": 1.0},
    "LPM, rank 16": {"rank": 16},
    "LPM, rank 8": {"rank": 8},
    "RegMean": {"method": "regmean"},
    "average": {"method": "average"},
}


@dataclass(frozen=True)
class ResidualStudy(Measurement):
    """How far the merged LoRA's outputs are from each task's own.

    Args:
        options (`Mapping[str, Any]`): Of merging.
    """

    options: Mapping[str, Any]

    def measure(self, shop: Workshop) -> Measured:
        folder = merge_folder(shop, len(shop.tasks), **self.options)
        found = merge_report(folder, conflicts=False, progress=False).interference
        return Measured([[100 * found[task.name] for task in shop.tasks]])


def predictions() -> Iterator[Measurement]:
    """For each merge its residual, and the accuracy of its LoRA with each task's own projector."""
    for name, options in MERGES.items():
        yield ResidualStudy(f"residual of {name}", RESIDUAL, "", options)
        yield Method(f"accuracy of {name}", ACCURACY, "", partial(lpm_own_projector, **options))
