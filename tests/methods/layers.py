"""Random layers of several tasks, for the methods' tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_many.algebra.lpm import LowRankDelta
from peft_many.algebra.sketch import CovarianceAccumulator
from peft_many.methods import LayerTask

seeds = st.integers(0, 10_000)


def layer_tasks(
    seed: int, ranks: Sequence[int] = (2, 3, 4), width: int = 14, out: int = 11, tokens: int = 40
) -> list[LayerTask]:
    """Tasks of these ranks (0: the layer is untrained), of weights between 0.5 and 1.5, measured on random inputs."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for rank in ranks:
        A, B = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
        mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
        inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing
        accumulator = CovarianceAccumulator(width)
        accumulator.update(inputs)
        weight = 0.5 + torch.rand(1, generator=generator).item()
        tasks.append(LayerTask(LowRankDelta(A, B), weight, accumulator.result()))
    return tasks


def dense(merged: LowRankDelta | Tensor) -> Tensor:
    return merged.double() if isinstance(merged, Tensor) else merged.dense()


def dense_deltas(tasks: Sequence[LayerTask]) -> list[Tensor]:
    return [task.delta.dense() for task in tasks]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def ties_reference(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES as its paper's algorithm 1 reads, entry by entry: trim, elect the sign of the sum, mean of the agreeing."""
    trimmed = []
    for tensor in tensors:
        kept = int(density * tensor.numel())
        threshold = tensor.abs().flatten().sort(descending=True).values[kept - 1] if kept else torch.inf
        trimmed.append(torch.where(tensor.abs() >= threshold, tensor, 0.0))
    merged = torch.zeros_like(tensors[0])
    for place in range(merged.numel()):
        values = [tensor.flatten()[place].item() for tensor in trimmed]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [weight * value for weight, value in zip(weights, values, strict=True) if value * sign > 0]
        merged.view(-1)[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged
