"""Fitting one affine layer to what several layers make of their own inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def affine_fit(
    parts: Iterable[tuple[float, Tensor, Tensor]], weight: Tensor, bias: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """The affine map that is nearest to the targets on the inputs, pulled a little towards a given one.

        minimise over W, b   Σ_t w_t mean ‖W x + b − y‖² + λ m ‖[W b] − [W₀ b₀]‖²_F

    over the rows `(x, y)` of each part, with `m` the mean of the diagonal of `Σ_t w_t mean [x 1]ᵀ [x 1]`. In float64.

    Args:
        parts (`Iterable[tuple[float, torch.Tensor, torch.Tensor]]`):
            `w_t ≥ 0`, inputs of shape `(n, in)` and targets of shape `(n, out)`.
        weight (`torch.Tensor`): `W₀`, shape `(out, in)`.
        bias (`torch.Tensor`, *optional*): `b₀`, shape `(out,)`; without it none is fitted.
        ridge (`float`): `λ > 0`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: `W` and `b`, float64.
    """
    start = weight.double() if bias is None else torch.cat([weight.double(), bias.double()[:, None]], dim=1)
    gram = torch.zeros(start.shape[1], start.shape[1], dtype=torch.float64)
    missing = torch.zeros_like(start)
    for share, x, y in parts:
        rows = x.double()
        if bias is not None:
            rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        gram.addmm_(rows.T, rows, alpha=share / len(rows))
        missing.addmm_((y.double() - rows @ start.T).T, rows, alpha=share / len(rows))
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    fitted = start + torch.cholesky_solve(missing.T, torch.linalg.cholesky(gram)).T
    return (fitted, None) if bias is None else (fitted[:, :-1], fitted[:, -1])
