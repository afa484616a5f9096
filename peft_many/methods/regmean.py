"""RegMean: least squares on the layers' inputs, with the correlations between inputs scaled down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.covariance import Covariance
from ..algebra.lpm import LowRankDelta
from ..algebra.scatter import SingularMergeError, cholesky, slices, span_is_cheaper
from .base import LayerTask, MergeMethod, check_share

_SINGULAR = "the sum of the tasks' covariances is singular; pass an `alpha` below 1"


@dataclass(frozen=True)
class RegMean(MergeMethod):
    """`ΔW = (Σ_t w_t ΔW_t G_t)(Σ_t w_t G_t)⁻¹`, `G_t = α C_t + (1 − α) diag C_t`, exactly; one task comes back.

    `C_t` are the stored covariances, means over tokens as the paper's Gram matrices are in its code. As all `ΔW_t`
    change one base model, merging deltas is merging weights. Inputs that are zero in all tasks get the mean delta.
    A task that did not train the layer counts as a delta of zero if its input was measured. float64; with low-rank
    statistics in the span of their factors where that is cheaper, never in `in × in` then.

    With `α = 1` and a ridge this is LPM.

    Args:
        alpha (`float`, defaults to `0.9`):
            The factor on off-diagonal entries, in (0, 1]; the authors' configurations take 0.9 or 0.1, by model.
    """

    alpha: float = 0.9

    name = "regmean"
    source = "RegMean, arXiv 2212.09849 (closed form, with reduced non-diagonal items)"
    needs_covariances = True

    def __post_init__(self) -> None:
        check_share("alpha", self.alpha)

    def merge(self, tasks: Sequence[LayerTask], layer: str = "") -> LowRankDelta:
        """`B = [B_1 … B_T]`, `A = [w_1 A_1 G_1; …; w_T A_T G_T] (Σ_t w_t G_t)⁻¹`."""
        covariances = [task.covariance for task in tasks if task.covariance is not None]
        rank, rows = sum(c.rank for c in covariances), sum(task.delta.A.shape[0] for task in tasks)
        if span_is_cheaper(covariances[0].width, rank, rows):  # never with one that is held whole
            A = self._in_span(tasks, covariances)
        else:
            A = self._by_cholesky(tasks, covariances)
        return LowRankDelta(A=A, B=torch.cat([task.delta.B for task in tasks], dim=1))

    def _by_cholesky(self, tasks: Sequence[LayerTask], covariances: Sequence[Covariance]) -> Tensor:
        device = tasks[0].delta.A.device
        matrices = [covariance.dense().to(device) for covariance in covariances]
        unseen = torch.stack([matrix.diagonal() for matrix in matrices]).sum(0) == 0
        total, moments = torch.zeros_like(matrices[0]), []
        for task, matrix in zip(tasks, matrices):
            diagonal = torch.where(unseen, 1.0, matrix.diagonal())
            matrix.mul_(self.alpha).diagonal().copy_(diagonal)
            total.add_(matrix, alpha=task.weight)
            moments.append(task.weight * task.delta.A.double() @ matrix)
        return torch.cholesky_solve(torch.cat(moments).T, cholesky(total, _SINGULAR)).T

    def _in_span(self, tasks: Sequence[LayerTask], covariances: Sequence[Covariance]) -> Tensor:
        """`R = Zᵀ Z + D`, `Z` stacks `√(w_t α) S_t`, `D` is diagonal: with `N = (I + Z D⁻¹ Zᵀ)⁻¹`, `Z R⁻¹ = N Z D⁻¹`.

        w A G_t R⁻¹ = A Z_tᵀ N_t Z D⁻¹ + A D_t D⁻¹ (I − Zᵀ N Z D⁻¹),   N_t: the rows of N that belong to Z_t
        """
        device = tasks[0].delta.A.device
        diagonals, stacked = [], []
        for task, covariance in zip(tasks, covariances):
            rows = covariance.factor_rows(device)
            diagonal = (1 - self.alpha) * rows.square().sum(0) + covariance.remainder
            diagonals.append(task.weight * diagonal)
            stacked.append((task.weight * self.alpha) ** 0.5 * rows)
        Z, D = torch.cat(stacked), torch.stack(diagonals).sum(0)
        seen_by_none = (Z == 0).all(0) & (D == 0)
        diagonals = [torch.where(seen_by_none, task.weight, diagonal) for task, diagonal in zip(tasks, diagonals)]
        D = torch.stack(diagonals).sum(0)
        if (D == 0).any():
            raise SingularMergeError(_SINGULAR)
        scaled = Z / D.sqrt()
        kernel = scaled @ scaled.T
        kernel.diagonal().add_(1.0)
        root = cholesky(kernel, _SINGULAR)
        coefficients, kept = [], []
        for task, rows, diagonal, place in zip(tasks, stacked, diagonals, slices([len(rows) for rows in stacked])):
            A = task.delta.A.double()
            own = A * (diagonal / D)
            in_span = -(own @ Z.T)
            in_span[:, place] += A @ rows.T
            coefficients.append(in_span)
            kept.append(own)
        return torch.cholesky_solve(torch.cat(coefficients).T, root).T @ (Z / D) + torch.cat(kept)
