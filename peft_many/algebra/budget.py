"""How many directions of a covariance to keep, from the error that the merged delta may have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .lpm import LowRankDelta
from .spectrum import Spectrum


def rank_within(spectrum: Spectrum, deltas: Sequence[LowRankDelta], error: float) -> int:
    """The fewest directions that keep the expected error of a merged delta within a budget.

    Truncation changes `C_t` by `E`, and with it, to first order, the merged delta by `(ΔW_t − ΔW*) E R⁻¹`, which on
    the tasks' inputs weighs at most `‖(ΔW_t − ΔW*) E C_t^-½‖`. A direction `v_i` with eigenvalue `σ_i`, replaced by
    the remainder `ρ_k`, has its share `(σ_i − ρ_k)² / max(σ_i, ρ_k)` in it, times how much `ΔW_t − ΔW*` does there.
    The other tasks are not known yet; they are taken to do as much as this one, evenly in all directions. Keeping
    energy instead asks how large an input is, but not whether any delta reads it.

    Args:
        spectrum ([`Spectrum`]): Of `C_t`.
        deltas (`Sequence[LowRankDelta]`): `ΔW_t` of each layer that has this input; none: as if they were isotropic.
        error (`float`): The budget, as a share of `‖ΔW_t C_t^½‖`, the size of the delta's outputs.

    Returns:
        `int`: `k`; all directions of the spectrum if no fewer suffice.
    """
    if not error > 0:
        raise ValueError(f"`error_budget` must be positive, but it is {error}.")
    width, followed = spectrum.directions.shape[1], len(spectrum.values)
    others = width - followed
    values = torch.cat([spectrum.values, spectrum.values.new_tensor([spectrum.rest / max(others, 1)])])
    counts = torch.ones(followed + 1, dtype=torch.float64)
    counts[-1] = others
    readings = [_reading(delta, spectrum) for delta in deltas] or [torch.full((followed + 1,), 1.0).double()]
    for kept in range(followed):
        remainder = spectrum.remainder(kept)
        tail = values[kept:]
        share = (tail - remainder).square() / torch.clamp(torch.maximum(tail, tail.new_tensor(remainder)), min=1e-300)
        lost = max(
            (((counts * reading)[kept:] * share).sum() / (counts * reading * values).sum().clamp(min=1e-300)).item()
            for reading in readings
        )
        if lost <= error**2:
            return kept
    return followed


def _reading(delta: LowRankDelta, spectrum: Spectrum) -> Tensor:
    """`‖ΔW v_i‖²` for each direction and the mean of all others, and the same again for tasks yet unknown."""
    A, B = delta.A.double().cpu(), delta.B.double().cpu()
    gram = B.T @ B
    seen = A @ spectrum.directions.T
    own = ((gram @ seen) * seen).sum(0)
    whole = ((gram @ A) * A).sum()
    others = spectrum.directions.shape[1] - len(own)
    beyond = ((whole - own.sum()) / max(others, 1)).clamp(min=0.0)
    return torch.cat([own, beyond[None]]) + whole / spectrum.directions.shape[1]
