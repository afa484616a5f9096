"""The merged delta of a layer from what passes through it: the tasks' targets on the inputs that it really gets."""

from __future__ import annotations

import torch
from torch import Tensor

from .lpm import LowRankDelta
from .reduction import nearest_of_rank
from .scatter import cholesky


class LayerRefit:
    """Fits the delta of one layer to targets on observed inputs, and brings it to a rank.

        minimise over ΔW   Σ_t w_t ( mean ‖ΔW x̂ − d‖² + λ_t ‖ΔW − ΔW_t‖²_F )
                           λ_t = λ · mean diag E[x̂ x̂ᵀ]

    over the tokens of task `t`, with `x̂` the layer's input in the merged model and `d` what its delta should make of
    it. With `d = ΔW_t x̂` this is LPM on the merged model's own inputs (RegMean++, arXiv 2508.03121); with `d` the
    task model's output less the base layer's output for `x̂` it also makes up for what earlier layers changed. The
    ridge `λ ≥ 0` pulls towards the tasks' own deltas, as in LPM.

    All sums are float64, of shape `in × in` and `out × in`, on a device that has to know it.
    """

    def __init__(self, out: int, width: int, ridge: float, device: torch.device | str = "cpu") -> None:
        self.ridge = ridge
        self._moments = torch.zeros(width, width, dtype=torch.float64, device=device)  # R
        self._targets = torch.zeros(out, width, dtype=torch.float64, device=device)  # Σ_t w_t (E[d x̂ᵀ] + λ_t ΔW_t)

    def add(self, inputs: Tensor, targets: Tensor, own: LowRankDelta, weight: float = 1.0) -> None:
        """Add one task: `x̂`, shape `(tokens, in)`, `d`, shape `(tokens, out)`, its `ΔW_t`, and `w_t`.

        Parts of its tokens may be added one by one, each with its share of `w_t`. There has to be a token. NaN or Inf
        among them is a `FloatingPointError`.
        """
        x, d = (rows.to(self._moments) for rows in (inputs, targets))
        moments, towards = x.T @ x / len(x), d.T @ x / len(x)
        if not (moments.isfinite().all() & towards.isfinite().all()):  # which NaN and Inf of a token end up in
            raise FloatingPointError("inputs or targets hold NaN or Inf")
        pull = self.ridge * moments.diagonal().mean()
        moments.diagonal().add_(pull)
        self._moments += weight * moments
        A, B = own.A.to(self._moments), own.B.to(self._moments)
        self._targets += weight * (towards + pull * B @ A)

    def solve(self, rank: int) -> LowRankDelta:
        """The best delta of at most this rank under the objective, float64, on the device.

        With `R = L Lᵀ` and `N` the targets, it is `W L⁻¹` with `W` the matrix of that rank that is nearest to
        `N R⁻¹ L = N L⁻ᵀ` (reduced-rank regression; Izenman 1975).
        """
        singular = "the covariance of its inputs is singular; pass a larger `ridge` or more samples"
        root = cholesky(self._moments, singular)
        whitened = torch.linalg.solve_triangular(root, self._targets.T, upper=False).T
        A, B = nearest_of_rank(whitened, min(rank, *whitened.shape))
        # Singular values are shared out, so that both factors keep their digits in half precision.
        lengths = A.norm(dim=1), B.norm(dim=0)  # one of them 1
        share = torch.where(lengths[0] > 0, (lengths[1] / lengths[0]).sqrt(), 0.0)
        A = torch.linalg.solve_triangular(root.T, (share[:, None] * A).T, upper=True).T
        return LowRankDelta(A=A, B=torch.where(share > 0, B / share, 0.0))
