"""KnOTS: bring the deltas into one basis by an SVD of all of them, and merge there, here with TIES."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.lpm import LowRankDelta
from .base import LayerTask, smallest_resolved, trained
from .ties import Ties


@dataclass(frozen=True)
class Knots(Ties):
    """KnOTS-TIES: `[ΔW_1 … ΔW_T] = U Σ [V_1ᵀ … V_Tᵀ]`, then `ΔW = λ U · TIES(Σ V_1ᵀ, …, Σ V_Tᵀ)`.

    In the common basis `U` entries of different tasks mean the same thing, so that their signs can be compared. As
    in the paper's code, singular values stay with `V_t`, and TIES compares them, too; unlike there, it trims layer by
    layer. The SVD is computed of the factors' `Σ r_t × Σ r_t` matrix, which is exact, never of the deltas. float64.

    Args:
        density (`float`, defaults to `0.2`):
            The share of entries to keep: the paper's code takes 0.2 for its vision models, and all for Llama.
        scaling (`float`, defaults to `1.0`): `λ`, a factor on the result; the paper searches it.
        majority_sign_method (`str`, defaults to `"total"`): As in [`Ties`].
    """

    name = "knots"
    source = "KnOTS-TIES, arXiv 2410.19735"

    def merge(self, tasks: Sequence[LayerTask], layer: str = "") -> LowRankDelta:
        """`B = U` with orthonormal columns, `A = λ TIES(Σ V_tᵀ)`."""
        tasks = trained(tasks)
        U = left_singular_vectors([task.delta for task in tasks])
        aligned = [(U.T @ task.delta.B.double()) @ task.delta.A.double() for task in tasks]  # Σ V_tᵀ = Uᵀ ΔW_t
        return LowRankDelta(A=self.combined(aligned, tasks), B=U)


def left_singular_vectors(deltas: Sequence[LowRankDelta]) -> Tensor:
    """Those of `[ΔW_1 … ΔW_T]` whose singular value is not zero, shape `(out, k)`, `k ≤ Σ r_t`; float64.

    With `[B_1 … B_T] = Q R` and `A_tᵀ = V_t L_t` they are `Q` times those of `[R_1 L_1ᵀ … R_T L_Tᵀ]`.
    """
    Q, upper = torch.linalg.qr(torch.cat([delta.B.double() for delta in deltas], dim=1))
    blocks = upper.split([delta.A.shape[0] for delta in deltas], dim=1)
    small = torch.cat([R @ torch.linalg.qr(delta.A.double().T).R.T for R, delta in zip(blocks, deltas)], dim=1)
    U, values, _ = torch.linalg.svd(small, full_matrices=False)
    return Q @ U[:, values > smallest_resolved(small, values)]
