"""What a merge costs each task, before any evaluation: how far the merged delta's outputs are from the task's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .covariance import Covariance
from .lpm import LowRankDelta, MergedDelta
from .spectrum import eigen_directions


def output_norm(delta: LowRankDelta, covariance: Covariance) -> float:
    """`‖ΔW C^½‖_F`, the root mean squared norm of what a delta adds to the layer's outputs."""
    return covariance.energy(_root(delta.B) @ delta.A.double()) ** 0.5


def relative_residual(merged: LowRankDelta, own: LowRankDelta, covariance: Covariance) -> float:
    """`‖(ΔW* − ΔW_t) C_t^½‖ / ‖ΔW_t C_t^½‖`: 0 if the task's own outputs come out, 1 as if its delta were lost.

    `C_t` is without a ridge; NaN if the task's own delta does nothing on its inputs. Differences are taken in float64;
    what then comes of them on the inputs is as exact as the covariance is stored.
    """
    difference = LowRankDelta(A=torch.cat([merged.A, own.A]), B=torch.cat([merged.B, -own.B], dim=1))
    whole = output_norm(own, covariance)
    return output_norm(difference, covariance) / whole if whole > 0 else math.nan


def relative_residuals(merged: MergedDelta, tasks: Sequence[tuple[LowRankDelta, Covariance | None]]) -> list[float]:
    """The [`relative_residual`] of every task `(ΔW_t, C_t)` that trained the layer, in the order of merging.

    Where the merged `B` is the tasks' `[B_1 … B_T]`, a task's difference is one in its block of `A*`, which saves
    going over all of `B` for every task. NaN where no input was measured, `C_t = None`.
    """
    if not merged.stacked:
        return [math.nan if of is None else relative_residual(merged, own, of) for own, of in tasks]
    root = _root(merged.B)
    outputs = root @ merged.A.double()
    found = []
    for block, (own, covariance) in zip(root.split([len(own.A) for own, _ in tasks], dim=1), tasks):
        whole = 0.0 if covariance is None else output_norm(own, covariance)
        if covariance is None or whole == 0:
            found.append(math.nan)
        else:
            found.append(covariance.energy(outputs - block @ own.A.double()) ** 0.5 / whole)
    return found


def _root(B: Tensor) -> Tensor:
    """`R` with `Rᵀ R = Bᵀ B`, float64, shape `(r, r)`: outputs `B y` are as long as `R y`."""
    values, vectors = torch.linalg.eigh(B.double().T @ B.double())
    return values.clamp(min=0.0).sqrt()[:, None] * vectors.T


def effective_rank_of_outputs(delta: LowRankDelta, covariance: Covariance) -> float:
    """How many directions a delta's outputs `ΔW x` spread over: `effective_rank` of the energies in `ΔW C ΔWᵀ`."""
    A, upper = delta.A.double(), torch.linalg.qr(delta.B.double()).R
    return effective_rank(torch.linalg.eigvalsh(upper @ (A @ covariance.product(A).T) @ upper.T))


def effective_rank_of_inputs(covariance: Covariance) -> float:
    """How many directions a layer's inputs spread over: `effective_rank` of the eigenvalues of `C`."""
    spectrum = eigen_directions(covariance)
    known, width = spectrum.directions.shape
    others = torch.full((width - known,), spectrum.remainder(known), dtype=torch.float64)
    return effective_rank(torch.cat([spectrum.values, others]))


def effective_rank(energies: Tensor) -> float:
    """The exponential of the entropy of the energies' shares (Roy and Vetterli 2007); between 1 and their number.

    Energies may be negative by rounding; without any, 0.
    """
    energies = energies.double().clamp(min=0.0)
    total = energies.sum()
    return torch.special.entr(energies / total).sum().exp().item() if total > 0 else 0.0
