"""Random least-squares problems, and the fp64 reference that the merge is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_many.algebra.covariance import Covariance, DenseCovariance, LowRankCovariance
from peft_many.algebra.lpm import LowRankDelta
from peft_many.algebra.sketch import CovarianceAccumulator
from peft_many.algebra.spectrum import eigen_directions


@dataclass
class Task:
    inputs: Tensor  # (tokens, in), float64
    delta: LowRankDelta
    weight: float

    @property
    def covariance(self) -> DenseCovariance:
        accumulator = CovarianceAccumulator(self.inputs.shape[1])
        accumulator.update(self.inputs)
        return accumulator.result()


def make_tasks(
    seed: int, tasks: int = 3, width: int = 12, tokens: int = 40, out: int = 7, rank: int = 2
) -> list[Task]:
    """Tasks whose inputs have uneven spectra and a large common direction, as a network's have."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = normal(width)
    made = []
    for t in range(tasks):
        spectrum = torch.logspace(0, -2, width, dtype=torch.float64)
        rotation = torch.linalg.qr(normal(width, width)).Q
        inputs = normal(tokens, width) * spectrum @ rotation + 3 * common
        delta = LowRankDelta(A=normal(rank + t, width).float(), B=normal(out, rank + t).float())
        made.append(Task(inputs, delta, 0.5 + torch.rand(1, generator=generator).item()))
    return made


def optimum(tasks: list[Task], ridge: float) -> Tensor:
    """`(Σ w ΔW C) R⁻¹` in float64, straight from its definition, with a solver of its own (SVD least squares)."""
    width = tasks[0].inputs.shape[1]
    moments, scatter = 0, 0
    for task in tasks:
        covariance = task.inputs.T @ task.inputs / len(task.inputs)
        covariance = covariance + ridge * covariance.diagonal().mean() * torch.eye(width, dtype=torch.float64)
        moments = moments + task.weight * task.delta.dense() @ covariance
        scatter = scatter + task.weight * covariance
    return torch.linalg.lstsq(scatter, moments.T, driver="gelsd").solution.T


def objective(tasks: list[Task], merged: Tensor, ridge: float) -> float:
    """`Σ_t w_t ‖(ΔW − ΔW_t) C_t^½‖²`, ridge inside."""
    total = 0.0
    for task in tasks:
        gap = merged - task.delta.dense()
        energy = task.inputs.square().sum(1).mean() / task.inputs.shape[1]
        total += task.weight * ((gap @ task.inputs.T).square().sum() / len(task.inputs)).item()
        total += task.weight * (ridge * energy * gap.square().sum()).item()
    return total


def truncate(
    covariance: Covariance, energy: float, dtype: torch.dtype = torch.float32, rank: int | None = None
) -> LowRankCovariance:
    """The covariance with a share of its energy, in a factor that nothing has rounded yet."""
    spectrum = eigen_directions(covariance)
    kept = spectrum.rank_of_energy(energy)
    return spectrum.keep(kept if rank is None else min(kept, rank), dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


seeds = st.integers(min_value=0, max_value=2**31)
