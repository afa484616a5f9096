"""What a merge costs each task, before any evaluation: how far the merged delta's outputs are from the task's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .covariance import Covariance
from .lpm import LowRankDelta, MergedDelta
from .scatter import slices, symmetric


def relative_residuals(merged: MergedDelta, tasks: Sequence[tuple[LowRankDelta, Covariance | None]]) -> Tensor:
    """`‖(ΔW* − ΔW_t) C_t^½‖ / ‖ΔW_t C_t^½‖` of each task `(ΔW_t, C_t)` that trained the layer, in order of merging.

    0 if the task's own outputs come out, 1 as if its delta were lost. NaN where no input was measured, `C_t = None`,
    and where the task's own delta does nothing on its inputs. `C_t` is without a ridge. Shape `(T,)`, float64, where
    the merged delta is: nothing waits for them.

    `ΔW* − ΔW_t = [B*, −B_t] [A*; A_t]`, so that both norms are `tr(BᵀB A C Aᵀ)` of small matrices, which solving has
    made already (`moments`) where `B*` is the tasks' `[B_1 … B_T]`: `BᵀB` is then one of `B*` alone, for all tasks.
    """
    rank, found = len(merged.A), []
    B = (merged.B if merged.stacked else torch.cat([merged.B, *(own.B for own, _ in tasks)], dim=1)).double()
    gram = B.T @ B
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
        found.append(
            torch.stack([_mean_square(difference, moment), _mean_square(gram[of_own, of_own], moment[rank:, rank:])])
        )
    lost, whole = torch.stack(found).unbind(1)
    return torch.where(whole > 0, (lost / whole).sqrt(), torch.nan)


def _mean_square(gram: Tensor, moment: Tensor) -> Tensor:
    """`tr(BᵀB A C Aᵀ)`, the mean squared norm of the outputs `B A x`."""
    return (gram * moment).sum().clamp(min=0.0)


def effective_ranks_of_outputs(deltas: Sequence[LowRankDelta], moments: Sequence[Tensor]) -> Tensor:
    """How many directions the outputs `ΔW_t x` of each delta spread over, by the `moments` `A_t C_t A_tᵀ`, `(T,)`.

    `effective_rank` of the energies in `ΔW C ΔWᵀ`.
    """
    uppers = [torch.linalg.qr(delta.B.double()).R for delta in deltas]
    return effective_rank(_eigenvalues([upper @ moment @ upper.T for upper, moment in zip(uppers, moments)]))


def effective_ranks_of_inputs(covariances: Sequence[Covariance]) -> Tensor:
    """How many directions a layer's inputs spread over: `effective_rank` of the eigenvalues of each `C_t`, `(T,)`."""
    width, grams = covariances[0].width, []
    for covariance in covariances:
        if covariance.rank < width:
            rows = covariance.factor_rows()
            grams.append(rows @ rows.T)
        else:
            grams.append(replace(covariance, remainder=0.0).dense())
    seen = _eigenvalues(grams)
    every = torch.nn.functional.pad(seen, (0, width - seen.shape[1]))
    remainders = torch.tensor([one.remainder for one in covariances], dtype=torch.float64).to(seen.device)
    return effective_rank(every.clamp(min=0.0) + remainders[:, None])


def _eigenvalues(matrices: Sequence[Tensor]) -> Tensor:
    """Those of several symmetric matrices at once, `(n, k)`, with zeros for what smaller ones have less."""
    size = max(len(matrix) for matrix in matrices)
    padded = [torch.nn.functional.pad(matrix, (0, size - len(matrix)) * 2) for matrix in matrices]
    return torch.linalg.eigvalsh(torch.stack(padded))


def effective_rank(energies: Tensor) -> Tensor:
    """The exponential of the entropy of the energies' shares (Roy and Vetterli 2007); between 1 and their number.

    Of each row of energies, which may be negative by rounding; without any, 0.
    """
    energies = energies.double().clamp(min=0.0)
    total = energies.sum(-1, keepdim=True)
    shares = energies / torch.where(total > 0, total, 1.0)
    return torch.where(total[..., 0] > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)
