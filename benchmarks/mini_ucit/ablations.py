"""What each choice in the method is worth: MAny with one thing changed at a time, asked after the last task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from .guessed import GuessedCovariances
from .methods import Answerer, Method, merged, refitted, same
from .workshop import Workshop
from .world import Task

TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0)
RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SAMPLES = (8, 32, 128, 512)
STATISTICS_RANKS = (8, 16, 32, 48, 64, 96)
EIGHT_BITS_RANKS = (16, 32, 48, 64)
ENERGIES = (0.9, 0.99, 0.999, 0.9999, 1.0)
GUESSED_SHARES = (0.1, 0.3, 0.6)
MERGED_RANKS = (4, 8, 16, 24, 32)
REFIT_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def _with_options(shop: Workshop, stage: int, **options: Any) -> Answerer:
    return same(merged(shop, stage, **options))


def _remeasured(shop: Workshop, stage: int, key: str, **options: Any) -> Answerer:
    def adapter(task: Task) -> Path:
        return shop.remeasured(task, key, **options)

    return same(merged(shop, stage, adapter=adapter))


def _on_base(shop: Workshop, stage: int) -> Answerer:
    return same(merged(shop, stage, adapter=shop.measured_on_base))


def _from_merge(shop: Workshop, stage: int) -> Answerer:
    places = {task.name: place for place, task in enumerate(shop.tasks, start=1)}
    return same(merged(shop, stage, adapter=lambda task: shop.after_merging(task, places[task.name])))


def _backwards(shop: Workshop) -> Workshop:
    return replace(shop, tasks=tuple(reversed(shop.tasks)))


def _merged_backwards(shop: Workshop, stage: int) -> Answerer:
    return same(merged(_backwards(shop), stage))


def _trained_backwards(shop: Workshop, stage: int) -> Answerer:
    other = replace(_backwards(shop), folder=shop.folder / "backwards")
    return same(PeftModel.from_pretrained(shop.base(), other.sequential(stage)))


def ablations() -> Iterator[Method]:
    """Every ablation; the group says what is changed."""
    yield from numbers()
    yield from choices()


def numbers() -> Iterator[Method]:
    """Those that change one number, step by step."""
    for tau in TEMPERATURES:
        yield Method(f"τ = {tau:g}", "temperature", "", partial(_with_options, temperature=tau))
    for ridge in RIDGES:
        yield Method(f"λ = {ridge:g}", "ridge", "", partial(_with_options, ridge=ridge))
    for samples in SAMPLES:
        after = partial(_remeasured, key=f"samples={samples}", samples=samples)
        yield Method(f"{samples} samples", "samples", "", after)
    for rank in STATISTICS_RANKS:
        yield Method(f"rank {rank}", "rank of the statistics", "", partial(_remeasured, key=f"rank={rank}", rank=rank))
    for rank in EIGHT_BITS_RANKS:
        after = partial(_remeasured, key=f"rank={rank},int8", rank=rank, dtype=torch.int8)
        yield Method(f"rank {rank}, int8", "rank of the statistics in eight bits", "", after)
    for energy in ENERGIES:
        after = partial(_remeasured, key=f"energy={energy:g}", energy=energy)
        yield Method(f"energy {energy:g}", "energy of the statistics", "", after)
    for rank in MERGED_RANKS:
        yield Method(f"merged rank {rank}", "rank of the merge", "", partial(_with_options, rank=rank))
    for ridge in REFIT_RIDGES:
        after = partial(refitted, targets="outputs", router="gaussian", ridge=ridge)
        yield Method(f"refit, λ = {ridge:g}", "ridge of the refit", "", after)
    for rank in MERGED_RANKS:
        after = partial(refitted, targets="outputs", router="gaussian", rank=rank)
        yield Method(f"refit, rank {rank}", "rank of the refit", "", after)


def choices() -> Iterator[Method]:
    """All others."""
    yield Method("measured on the base model", "what is measured", "", _on_base)
    for share in GUESSED_SHARES:
        for of, what in (("delta", "ΔWᵀΔW"), ("A", "AᵀA")):
            after = partial(_with_options, router="gaussian", method=GuessedCovariances(of, share))
            yield Method(f"{share:g} {what}", "covariances guessed from the weights", "", after)
    yield Method("each task trained from the merge so far", "what is trained from", "", _from_merge)
    yield Method("MAny, last task first", "order of the tasks", "", _merged_backwards)
    yield Method("sequential, last task first", "order of the tasks", "", _trained_backwards)
