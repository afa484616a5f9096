"""From the sums of streaming sketches to eigen-directions: sketches of equal shape together, wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .spectrum import Spectrum, decomposed

_TRIES = 16  # each with ten times the shift of the one before, the last beyond what any sum can need


def nystrom_spectra(test: Sequence[Tensor], moved: Tensor, core: Tensor, traces: Tensor) -> list[Spectrum]:
    """The spectra of `C ≈ Y (QᵀQ)⁻¹ Yᵀ` for each of several `Ω`, with `Y = XᵀQ` and `Q = X Ω`.

    `Ω` are orthonormal up to rounding, shape `(in, size)`; `Y`, `(n, in, size)`, `QᵀQ` and `tr C`, `(n,)`, are float64
    means over the tokens, and the first two are overwritten. Directions stay where they are; the host waits once for
    the numbers, and again only for sketches that have to be done again (`eigh` on a GPU waits too, to see that it
    converged).

    Float32 rounding of the sums may make `QᵀQ` negative in its smallest directions. The sketch of `C + s I` with a
    small shift `s`, which is taken off again, is definite.
    """
    rounding = torch.finfo(torch.float32).eps
    shift, step = torch.zeros_like(traces), rounding * torch.linalg.vector_norm(moved, dim=(1, 2))
    for _ in range(_TRIES):
        shift = shift + step
        core.diagonal(dim1=1, dim2=2).add_(step[:, None])
        for one, own, more in zip(moved, test, step):
            one.addcmul_(own.to(one), more)
        root, info = torch.linalg.cholesky_ex(core)
        failed = info != 0
        harmless = torch.eye(core.shape[1], dtype=core.dtype, device=core.device)
        root = torch.where(failed[:, None, None], harmless, root)  # `eigh` takes no NaN
        values, directions = decomposed(torch.linalg.solve_triangular(root, moved.mT, upper=False))
        values = (values - shift[:, None]).clamp(min=0.0)
        rest = (traces - values.sum(1)).clamp(min=0.0)
        numbers = torch.cat([failed[:, None], rest[:, None], values], dim=1).cpu()
        if not numbers[:, 0].any():
            return [Spectrum(of[2:], found, of[1].item()) for of, found in zip(numbers, directions)]
        step = torch.where(failed, 9 * shift, 0.0)
    raise FloatingPointError("the sums of a sketch hold NaN or Inf")
