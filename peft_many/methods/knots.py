"""KnOTS: bring the deltas into one basis by an SVD of all of them, and merge there, here with TIES."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.utils.merge_utils import ties
from torch import Tensor

from ..algebra.lpm import LowRankDelta
from .base import LayerTask, MergeMethod, check_finite, check_share, trained
from .ties import check_sign_method, unpruned_is_fine, weights_of


@dataclass(frozen=True)
class Knots(MergeMethod):
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

    density: float = 0.2
    scaling: float = 1.0
    majority_sign_method: str = "total"

    name = "knots"
    source = "KnOTS-TIES, arXiv 2410.19735"

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_finite("scaling", self.scaling)
        check_sign_method(self.majority_sign_method)

    def merge(self, tasks: Sequence[LayerTask], layer: str = "") -> LowRankDelta:
        """`B = U` with orthonormal columns, `A = λ TIES(Σ V_tᵀ)`."""
        tasks = trained(tasks)
        U = left_singular_vectors([task.delta for task in tasks])
        aligned = [(U.T @ task.delta.B.double()) @ task.delta.A.double() for task in tasks]  # Σ V_tᵀ = Uᵀ ΔW_t
        with unpruned_is_fine():
            merged = ties(aligned, weights_of(tasks, aligned[0]), self.density, self.majority_sign_method)
        return LowRankDelta(A=self.scaling * merged, B=U)


def left_singular_vectors(deltas: Sequence[LowRankDelta]) -> Tensor:
    """Those of `[ΔW_1 … ΔW_T]` whose singular value is not zero, shape `(out, k)`, `k ≤ Σ r_t`; float64.

    With `[B_1 … B_T] = Q R` and `A_tᵀ = V_t L_t` they are `Q` times those of `[R_1 L_1ᵀ … R_T L_Tᵀ]`.
    """
    Q, upper = torch.linalg.qr(torch.cat([delta.B.double() for delta in deltas], dim=1))
    blocks = upper.split([delta.A.shape[0] for delta in deltas], dim=1)
    small = torch.cat([R @ torch.linalg.qr(delta.A.double().T).R.T for R, delta in zip(blocks, deltas)], dim=1)
    U, values, _ = torch.linalg.svd(small, full_matrices=False)
    tolerance = max(small.shape) * torch.finfo(small.dtype).eps * values[0]
    return Q @ U[:, values > tolerance]
