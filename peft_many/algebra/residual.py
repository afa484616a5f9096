"""What a merge costs each task, before any evaluation: how far the merged delta's outputs are from the task's own."""

from __future__ import annotations

import torch
from torch import Tensor

from .covariance import Covariance, eigen_directions
from .lpm import LowRankDelta


def output_norm(delta: LowRankDelta, covariance: Covariance) -> float:
    """`‖ΔW C^½‖_F`, the root mean squared norm of what a delta adds to the layer's outputs; in float64."""
    A, B = delta.A.double(), delta.B.double()
    return ((B.T @ B) * (A @ covariance.product(A).T)).sum().clamp(min=0.0).sqrt().item()


def relative_residual(merged: LowRankDelta, own: LowRankDelta, covariance: Covariance) -> float:
    """`‖(ΔW* − ΔW_t) C_t^½‖ / ‖ΔW_t C_t^½‖`: 0 if the task's own outputs come out, 1 as if its delta were lost.

    Args:
        merged ([`LowRankDelta`]): `ΔW*`.
        own ([`LowRankDelta`]): `ΔW_t`.
        covariance ([`Covariance`]): `C_t`, without a ridge.

    Returns:
        `float`: NaN if the task's own delta does nothing on its inputs.
    """
    difference = LowRankDelta(A=torch.cat([merged.A, own.A]), B=torch.cat([merged.B, -own.B], dim=1))
    whole = output_norm(own, covariance)
    return output_norm(difference, covariance) / whole if whole > 0 else float("nan")


def effective_rank_of_outputs(delta: LowRankDelta, covariance: Covariance) -> float:
    """How many directions a delta's outputs `ΔW x` spread over: `effective_rank` of the energies in `ΔW C ΔWᵀ`."""
    A, upper = delta.A.double(), torch.linalg.qr(delta.B.double()).R
    return effective_rank(torch.linalg.eigvalsh(upper @ (A @ covariance.product(A).T) @ upper.T))


def effective_rank_of_inputs(covariance: Covariance) -> float:
    """How many directions a layer's inputs spread over: `effective_rank` of the eigenvalues of `C`."""
    spectrum = eigen_directions(covariance)
    others = spectrum.directions.shape[1] - len(spectrum.values)
    return effective_rank(torch.cat([spectrum.values, torch.full((others,), spectrum.rest / max(others, 1)).double()]))


def effective_rank(energies: Tensor) -> float:
    """The exponential of the entropy of the energies' shares (Roy and Vetterli 2007); between 1 and their number.

    Args:
        energies (`torch.Tensor`): Shape `(n,)`, not negative but for rounding.

    Returns:
        `float`: 0 if there is no energy.
    """
    energies = energies.double().clamp(min=0.0)
    total = energies.sum()
    return torch.special.entr(energies / total).sum().exp().item() if total > 0 else 0.0
