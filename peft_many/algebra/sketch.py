"""Running sums of a layer's inputs: whole, or a streaming sketch in bounded memory whatever the layer's width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .covariance import Covariance, DenseCovariance, LowRankCovariance
from .devices import float64_device, has_caches
from .nystrom import nystrom_spectra
from .precision import float32_products, without_autocast
from .spectrum import Spectrum, eigen_directions
from .total import Total

# On a CPU, features that are multiplied at a time, and tokens: so much of an input is copied in another dtype at once.
_BLOCK = 2048
_TOKENS = 4096
# In the `Y` of sketches that a GPU finishes together.
MOST_NUMBERS = 2**25


def running_covariance(
    width: int, size: int | None = None, device: torch.device | str = "cpu"
) -> CovarianceAccumulator | CovarianceSketch:
    """A sketch of `size` directions, or, of inputs that are no wider and with no `size`, the whole sum."""
    device = torch.device(device)
    if size is not None and size < width:
        return CovarianceSketch(width, size, device)
    return CovarianceAccumulator(width, float64_device(device))


class CovarianceAccumulator:
    """Sums `x xᵀ` over batches and gives their mean.

    Products and sums are float64: float32 products leave noise of 1e-7 of the *largest* eigenvalue in directions that
    no token reached, far above a small ridge, and the merge divides by those directions.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0

    @property
    def sum_of_squares(self) -> Tensor:
        """`Σ ‖x‖²`, float64, one number on the sums' device; not finite if an input was not."""
        return self.total.diagonal().sum()

    def update(self, inputs: Tensor) -> None:
        """Add rows, shape `(tokens, in)`, any floating dtype."""
        for part in inputs.detach().to(self.total.device).split(max(_TOKENS, len(self.total))):
            rows = part.double()
            self.total.addmm_(rows.T, rows)
        self.tokens += len(inputs)

    def result(self) -> DenseCovariance:
        """The mean of `x xᵀ` over all rows so far, on the CPU; zero if there were none."""
        # addmm is symmetric up to rounding; make it so to the bit, as it is stored and checked.
        mean = (self.total + self.total.T).div_(2 * max(self.tokens, 1))
        return DenseCovariance(remainder=0.0, matrix=mean.cpu())


class CovarianceSketch:
    """Sums up `C = E[x xᵀ]` along `size` directions, and its trace exactly; never holds an `in × in` matrix.

    A streaming Nyström sketch (Tropp, Yurtsever, Udell, Cevher 2017, arXiv 1706.05736): with a fixed test matrix `Ω`
    (in × size) and `Q = X Ω` only `Y = XᵀQ` and `QᵀQ` are summed up, and in the end `C ≈ Y (QᵀQ)⁻¹ Yᵀ`, which is `XᵀX`
    with the tokens projected on the span of `Q`'s columns. Unlike there, `Ω` is not random but comes from the first
    tokens, `Ω = orth(C₁ G)` with random signs `G` and `C₁` their second moment, which makes `Y` one step of a subspace
    iteration. The merged deltas are then within a sixth, often a few per cent, of the best approximation's of its
    rank, at two matrix products for each token; Frequent Directions and incremental SVD cost ten times as much
    (`benchmarks/sketches.py`).

    The first `2 · size` tokens are kept as they are: they take no more memory than the sums, and with no more tokens
    than these nothing is lost.

    Products are float32, whatever precision the user allows for matrix products. Of bfloat16 activations `Q` is
    bfloat16 as well, which halves the cost: as a projection's span, its rounding counts only squared, and the products
    of what has been rounded are exact but for float32 sums. Totals are float64 (see [`Total`]), as is the final
    decomposition. Of the directions that are followed, the last fifth or so is inaccurate.

    Nothing is read from a GPU while rows are added: whether all were finite is seen in `sum_of_squares`.
    """

    def __init__(self, width: int, size: int, device: torch.device | str = "cpu") -> None:
        self.width, self.size, self.device = width, size, torch.device(device)
        self.tokens = 0
        self.first: list[Tensor] = []
        self.sums: _Sums | None = None  # once there are more tokens than are kept

    @property
    def sum_of_squares(self) -> Tensor:
        """`Σ ‖x‖²`, of which the mean is `tr C`: one number on the sums' device, float64 if that has it.

        Not finite if an input was not, or had entries near 1e18.
        """
        if self.sums is not None:
            return self.sums.sum_of_squares.sum.squeeze(0)
        total = Total(1, device=self.device)
        for rows in self.first:
            total.add(_sum_of_squares(rows.float()))
        return total.sum.squeeze(0)

    @without_autocast()
    def update(self, inputs: Tensor) -> None:
        """Add rows as in a [`CovarianceAccumulator`]."""
        rows = inputs.detach().to(self.device)
        self.tokens += len(rows)
        if self.sums is None:
            if self.tokens < 2 * self.size:
                self.first.append(rows.clone())
                return
            rows, self.first = torch.cat([*self.first, rows]) if self.first else rows, []
            self.sums = _Sums(_test_matrix(rows, self.size))
        self.sums.add(rows)

    def result(self) -> LowRankCovariance:
        """The mean of `x xᵀ` over all rows so far: up to `size` directions, and the rest of the trace.

        It stays on the device, or on one that has float64.
        """
        return spectra([self])[0].keep(self.size)


def spectra(sketches: Sequence[CovarianceSketch]) -> list[Spectrum]:
    """Eigenvalues and eigen-directions of the means of `x xᵀ`, of several sketches of one shape and device; or of one.

    At most `size` of them, but for few tokens. Eigenvalues are never above the true ones by more than rounding, and
    the trace is exact.
    """
    home, sums = float64_device(sketches[0].device), [one.sums for one in sketches if one.sums is not None]
    if not sums:
        (sketch,) = sketches
        parts = [rows.to(home, torch.float64) for rows in (torch.empty(0, sketch.width), *sketch.first)]
        factor = torch.cat(parts) / max(sketch.tokens, 1) ** 0.5
        return [eigen_directions(LowRankCovariance(remainder=0.0, factor=factor))]
    width, size = sums[0].test.shape
    moved = torch.empty(len(sums), width, size, dtype=torch.float64, device=home)
    core = torch.empty(len(sums), size, size, dtype=torch.float64, device=home)
    for place, (part, sketch) in enumerate(zip(sums, sketches, strict=True)):
        torch.div(part.moved.value(), sketch.tokens, out=moved[place])
        torch.div(part.core.value(), sketch.tokens, out=core[place])
    traces = [one.sum_of_squares.to(home, torch.float64) / one.tokens for one in sketches]
    return nystrom_spectra([part.test for part in sums], moved, core, torch.stack(traces))


def finished(
    sums: dict[str, CovarianceAccumulator | CovarianceSketch], most_numbers: int = MOST_NUMBERS
) -> Iterator[tuple[str, Covariance]]:
    """The results of running sums by name, in any order; `sums` is emptied on the way, for they are large.

    On a GPU, sketches of one shape are finished together, so many that their `Y` have no more than `most_numbers`:
    that takes 32 bytes a number beside the sums, 1 GB. A CPU is busy with one.
    """
    alike: dict[Any, dict[str, CovarianceSketch]] = {}
    for name in list(sums):
        running = sums.pop(name)
        if isinstance(running, CovarianceSketch) and running.sums is not None and not has_caches(running.device):
            alike.setdefault((running.device, running.width, running.size), {})[name] = running
        else:
            yield name, running.result()
    for (_, width, size), sketches in alike.items():
        together = max(1, most_numbers // (width * size))
        while sketches:
            batch = {name: sketches.pop(name) for name in list(sketches)[:together]}
            for name, spectrum in zip(batch, spectra(list(batch.values()))):
                yield name, spectrum.keep(size)


class _Sums:
    """`Ω`, `Y`, `QᵀQ` and `Σ ‖x‖²`, none of them yet divided by the tokens. `Ω` lies in memory as its transpose."""

    def __init__(self, test: Tensor) -> None:
        self.test = test
        self.moved = Total(*test.shape, device=test.device)
        self.core = Total(test.shape[1], test.shape[1], device=test.device)
        self.sum_of_squares = Total(1, device=test.device)

    def add(self, rows: Tensor) -> None:
        """Add the products of some rows, and their squares.

        A CPU converts them one block of features after the other, whose copies stay in its cache. Other devices get
        the whole at once: CUDA sums up products of bfloat16 in float32 without a copy; float16 becomes float32, as `Q`
        may overflow in float16, with factors that are exact in TF32.
        """
        in_blocks, width = has_caches(rows.device), rows.shape[1]
        halves = (torch.bfloat16,) if in_blocks else (torch.bfloat16, torch.float16)
        rounded = rows.dtype if rows.dtype in halves else torch.float32
        with float32_products(rounded):
            if rows.dtype != torch.bfloat16:
                rows = rows.float()
            projected = rows @ self.test.to(rows.dtype)
            if rounded != torch.float32:
                projected = projected.bfloat16()
            if not (rows.dtype == torch.bfloat16 and _sums_bfloat16_in_float32(rows.device)):
                projected = projected.float()
                rows = rows if in_blocks else rows.float()
            self.core.add(_inner(projected, projected))
            step = width if rows.dtype == projected.dtype else _BLOCK
            for start, part in zip(range(0, width, step), rows.split(step, dim=1)):
                block = part.to(projected.dtype)
                self.sum_of_squares.add(_sum_of_squares(block))
                self.moved.add(_inner(block, projected), start)


def _sums_bfloat16_in_float32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _inner(rows: Tensor, others: Tensor) -> Tensor:
    """`rowsᵀ · others`, float32, of two of one dtype."""
    if rows.dtype == torch.float32:
        return rows.T @ others
    return torch.mm(rows.T, others, out_dtype=torch.float32)


def _sum_of_squares(rows: Tensor) -> Tensor:
    """`Σ ‖x‖²` of a batch, shape `(1,)`, float32."""
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return torch.dot(norms, norms).unsqueeze(0)


def _test_matrix(rows: Tensor, size: int) -> Tensor:
    """`Ω = orth(C₁ G)` for the second moment `C₁` of `rows`, shape `(in, size)`, in the dtype of the products.

    By the Cholesky factor of the Gram matrix in float64: a GPU takes a fraction of the time of a QR decomposition.
    """
    signs = _random_signs(rows.shape[1], size, rows.device)
    first = _Sums(signs)
    first.add(rows)
    moved, mean = first.moved.value(), first.sum_of_squares.value() / rows.numel()
    moved /= len(rows) * mean.clamp(min=1e-30)
    # Where the first tokens span fewer than `size` directions, random ones take the free places.
    moved += 1e-3 * signs.to(moved.device)
    gram = moved.T @ moved
    gram.diagonal().add_(torch.finfo(torch.float64).eps * gram.diagonal().sum())
    transposed = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram).L, moved.T, upper=False)
    dtype = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
    return transposed.to(dtype, memory_format=torch.contiguous_format).to(rows.device).T


def _random_signs(width: int, size: int, device: torch.device) -> Tensor:
    """A matrix of ±1, float32, that is the same on every device, made there: bits of a hash (splitmix64)."""
    bits = torch.arange(1, width * size + 1, device=device).mul_(-0x61C8864680B583EB)  # products wrap around
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits.bitwise_xor_(bits >> shift).mul_(factor)
    bits.bitwise_xor_(bits >> 31)
    return (bits & 1).float().mul_(2).sub_(1).view(width, size)
