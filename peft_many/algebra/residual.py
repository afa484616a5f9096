"""What a merge costs each task, before any evaluation: how far the merged delta's outputs are from the task's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .covariance import Covariance
from .devices import numbers_of
from .lpm import LowRankDelta, MergedDelta
from .scatter import slices, symmetric
from .spectrum import eigen_directions


def output_norm(delta: LowRankDelta, covariance: Covariance) -> float:
    """`‖ΔW C^½‖_F`, the root mean squared norm of what a delta adds to the layer's outputs."""
    return _energy(_gram(delta.B), covariance.moment(delta.A)).sqrt().item()


def relative_residual(merged: LowRankDelta, own: LowRankDelta, covariance: Covariance) -> float:
    """`‖(ΔW* − ΔW_t) C_t^½‖ / ‖ΔW_t C_t^½‖`: 0 if the task's own outputs come out, 1 as if its delta were lost.

    `C_t` is without a ridge; NaN if the task's own delta does nothing on its inputs. All is float64.
    """
    whole = MergedDelta(A=merged.A, B=merged.B, stacked=False)
    return relative_residuals(whole, [(own, covariance)])[0]


def relative_residuals(merged: MergedDelta, tasks: Sequence[tuple[LowRankDelta, Covariance | None]]) -> list[float]:
    """The [`relative_residual`] of every task `(ΔW_t, C_t)` that trained the layer, in the order of merging.

    NaN where no input was measured, `C_t = None`.
    """
    return residual_shares(numbers_of([output_energies(merged, tasks)])[0])


def residual_shares(energies: Sequence[float]) -> list[float]:
    """The [`relative_residuals`] of the numbers in [`output_energies`]."""
    pairs = zip(energies[::2], energies[1::2])
    return [(lost / whole) ** 0.5 if whole > 0 else math.nan for lost, whole in pairs]


def output_energies(merged: MergedDelta, tasks: Sequence[tuple[LowRankDelta, Covariance | None]]) -> Tensor:
    """`‖(ΔW* − ΔW_t) C_t^½‖²` and `‖ΔW_t C_t^½‖²` of every task, shape `(T, 2)`, where the merged delta is.

    `ΔW* − ΔW_t = [B*, −B_t] [A*; A_t]`, so that they are `tr(BᵀB A C Aᵀ)` of small matrices, which solving has made
    already (`moments`) where `B*` is the tasks' `[B_1 … B_T]`: `BᵀB` is then one of `B*` alone, for all tasks.
    """
    rank, found = len(merged.A), []
    gram = _gram(merged.B if merged.stacked else torch.cat([merged.B, *(own.B for own, _ in tasks)], dim=1))
    for t, (block, (own, covariance)) in enumerate(zip(slices([len(own.A) for own, _ in tasks]), tasks)):
        if covariance is None:
            found.append(gram.new_full((2,), torch.nan))
            continue
        start = block.start if merged.stacked else rank + block.start
        of_own = slice(start, start + len(own.A))
        if merged.moments is not None:
            moment = merged.moments[t]
        else:
            moment = covariance.moment(torch.cat([merged.A.double(), own.A.double()]))
        difference = symmetric(gram[:rank, :rank], -gram[:rank, of_own], gram[of_own, of_own])
        found.append(torch.stack([_energy(difference, moment), _energy(gram[of_own, of_own], moment[rank:, rank:])]))
    return torch.stack(found)


def _gram(B: Tensor) -> Tensor:
    exact = B.double()
    return exact.T @ exact


def _energy(gram: Tensor, moment: Tensor) -> Tensor:
    """`tr(BᵀB A C Aᵀ)`, the mean squared norm of the outputs `B A x`."""
    return (gram * moment).sum().clamp(min=0.0)


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
