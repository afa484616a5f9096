"""RobustMerge against its equations, written out in loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_many.algebra.lpm import LowRankDelta
from peft_many.methods import LayerTask, RobustMerge
from tests.methods.layers import dense, layer_tasks, relative_error, seeds


def kept(matrix: Tensor, density: float) -> Tensor:
    flat = matrix.double().abs().flatten()
    order = flat.argsort(descending=True)[: int(density * len(flat))]
    mask = torch.zeros_like(flat).index_fill(0, order, 1.0)
    return matrix.double() * mask.view(matrix.shape)


def reference(tasks: list[LayerTask], density: float, scaling: float) -> Tensor:
    rank = max(len(task.delta.A) for task in tasks)
    out, width = tasks[0].delta.B.shape[0], tasks[0].delta.A.shape[1]
    S = torch.zeros(len(tasks), rank, dtype=torch.float64)
    for t, task in enumerate(tasks):
        pruned = kept(task.delta.A, density)
        for i, row in enumerate(task.delta.A.double()):
            if pruned[i].any():
                S[t, i] = row.abs().sum() / pruned[i].abs().sum()
    A, B = torch.zeros(rank, width, dtype=torch.float64), torch.zeros(out, rank, dtype=torch.float64)
    for t, task in enumerate(tasks):
        for i in range(len(task.delta.A)):
            A[i] += task.weight * kept(task.delta.A, density)[i]
            if S[:, i].sum() > 0:
                B[:, i] += S[t, i] / S[:, i].sum() * kept(task.delta.B, density)[:, i]
    return scaling * B @ A


@given(seeds, st.sampled_from([0.1, 0.2, 1.0]), st.sampled_from([[3, 3, 3], [2, 4, 1]]))
def test_it_is_the_paper_s_equations(seed, density, ranks):
    tasks = layer_tasks(seed, ranks=ranks)
    assert relative_error(dense(RobustMerge(density, 2.0).merge(tasks)), reference(tasks, density, 2.0)) < 1e-10


def test_what_pruning_took_most_of_is_scaled_up_most():
    """Two tasks of one row; the row whose energy is spread out lost more, and its column of `B` counts for more."""
    peaked, spread = torch.full((1, 10), 0.01), torch.ones(1, 10)
    peaked[0, 0] = 1.0
    one, two = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    tasks = [LayerTask(LowRankDelta(peaked, one), 1.0), LayerTask(LowRankDelta(spread, two), 1.0)]
    B = RobustMerge(density=0.5).merge(tasks).B
    expected = torch.tensor([1.09 / 1.04, 10 / 5], dtype=torch.float64)
    assert B[:, 0].tolist() == pytest.approx((expected / expected.sum()).tolist())


def test_the_rank_is_the_largest_of_the_tasks():
    tasks = layer_tasks(0, ranks=[2, 0, 5])
    assert RobustMerge().rank_of([2, 0, 5]) == 5
    assert RobustMerge().merge(tasks).A.shape == (5, 14)


def test_one_unpruned_task_comes_back_scaled():
    (task,) = layer_tasks(1, ranks=[3])
    merged = dense(RobustMerge(density=1.0, scaling=1.0).merge([task]))
    assert relative_error(merged, task.weight * task.delta.dense()) < 1e-10
