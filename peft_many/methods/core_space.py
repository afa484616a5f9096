"""Core Space: merge small core matrices in bases that all tasks share, here by task singular vectors (TSV-M)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.lpm import LowRankDelta
from .base import LayerTask, MergeMethod, check_finite, smallest_resolved, trained


@dataclass(frozen=True)
class CoreSpace(MergeMethod):
    """TSV-M in Core Space: the tasks' leading singular directions side by side, made orthogonal to each other.

        bases       Q_B of all B_t and Q_A of all A_tᵀ, orthonormal
        core        M_t = Q_Bᵀ (w_t B_t A_t) Q_A = U_t Σ_t V_tᵀ
        TSV-M       ΔW = λ Q_B · U · diag(Σ_1 … Σ_T) · Vᵀ · Q_Aᵀ
                    U = orth([U_1 … U_T]),  V = orth([V_1 … V_T])

    `orth(X)` is the nearest matrix with orthonormal columns, `P Sᵀ` of the SVD `X = P Λ Sᵀ`. Of the core's `n`
    dimensions each task gets `⌊n / T⌋`, so with equal ranks nothing is cut off. The core matrices are
    `Σ r_t × Σ r_t`, and the result is that of TSV-M on the deltas themselves, as it does not depend on the bases.
    float64.

    One task comes back as it was, and so do several equal ones: directions that coincide count once (there the
    paper's code depends on rounding).

    Args:
        scaling (`float`, defaults to `1.0`): `λ`, a factor on the result; Core Space's code searches it.
    """

    scaling: float = 1.0

    name = "core_space"
    source = "Core Space, arXiv 2509.17786, with TSV-Merge, arXiv 2412.00081"

    def __post_init__(self) -> None:
        check_finite("scaling", self.scaling)

    def merge(self, tasks: Sequence[LayerTask], layer: str = "") -> LowRankDelta:
        """`B = Q_B orth(U)`, `A = λ diag(Σ) orth(V)ᵀ Q_Aᵀ`."""
        tasks = trained(tasks)
        left = torch.linalg.qr(torch.cat([task.delta.B.double() for task in tasks], dim=1)).Q
        right = torch.linalg.qr(torch.cat([task.delta.A.double() for task in tasks]).T).Q
        share = max(1, min(left.shape[1], right.shape[1]) // len(tasks))
        parts = [_leading(self._core(task, left, right), share) for task in tasks]
        U, values, V = (torch.cat(part, dim=-1) for part in zip(*parts))
        A = (self.scaling * values)[:, None] * (right @ _orthogonal(V)).T
        return LowRankDelta(A=A, B=left @ _orthogonal(U))

    @staticmethod
    def _core(task: LayerTask, left: Tensor, right: Tensor) -> Tensor:
        return task.weight * (left.T @ task.delta.B.double()) @ (task.delta.A.double() @ right)


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets `U, σ, V`, at most `count`, none whose value is zero up to rounding."""
    U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(count, int((values > smallest_resolved(matrix, values)).sum()))
    return U[:, :kept], values[:kept], Vh[:kept].T


def _orthogonal(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns; a partial isometry where the columns are dependent."""
    P, values, Sh = torch.linalg.svd(columns, full_matrices=False)
    kept = values > smallest_resolved(columns, values)
    return P[:, kept] @ Sh[kept]
