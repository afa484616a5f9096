"""Least squares on covariances that are guessed from the weights, for adapters that nobody measured: does it help?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_many.methods import LayerTask, MergeMethod


@dataclass(frozen=True)
class GuessedCovariances(MergeMethod):
    """LPM with `C_t ≈ (1 − s) I + s · in · G_t / tr G_t` where `G_t` is a Gram matrix of the task's own weights.

    With `share=0` it is the average. Gradients are outer products with the inputs, so the rows of `A_t` should point
    where the inputs do; ACE-Merging (arXiv 2603.02945) and others build on that. float64.

    Args:
        of (`str`): `"delta"` for `G_t = ΔW_tᵀ ΔW_t`, `"A"` for `A_tᵀ A_t`.
        share (`float`): `s`, in [0, 1).
    """

    of: str = "delta"
    share: float = 0.3
    name = "guessed"
    source = "covariances from deltas, as arXiv 2603.02945 does"

    def merge(self, tasks: Sequence[LayerTask], layer: str = "") -> Tensor:
        width = tasks[0].delta.A.shape[1]
        moments, scatter = torch.zeros(()), torch.zeros(())
        for task in tasks:
            delta = task.delta.dense()
            rows = delta if self.of == "delta" else task.delta.A.double()
            gram = rows.T @ rows
            guess = (1 - self.share) * torch.eye(width, dtype=torch.float64)
            guess += self.share * width * gram / gram.trace().clamp(min=torch.finfo(torch.float64).tiny)
            moments = moments + task.weight * delta @ guess
            scatter = scatter + task.weight * guess
        return torch.linalg.solve(scatter, moments, left=False)
