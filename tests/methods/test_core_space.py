"""TSV-M in Core Space against TSV-M on the dense deltas."""

from dataclasses import replace

import torch
from hypothesis import given
from torch import Tensor

from peft_many.algebra.lpm import LowRankDelta
from peft_many.methods import CoreSpace, LayerTask, TaskArithmetic
from tests.methods.layers import dense, dense_deltas, layer_tasks, relative_error, seeds


def polar(columns: Tensor) -> Tensor:
    """`X (XᵀX)^-½`, the whitened columns of TSV-M's equation for independent columns."""
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    return columns @ vectors @ torch.diag(values.rsqrt()) @ vectors.T


def reference(tasks: list[LayerTask], share: int) -> Tensor:
    """TSV-M: the leading `share` singular triplets of each dense delta, side by side, whitened."""
    left, values, right = [], [], []
    for task, delta in zip(tasks, dense_deltas(tasks), strict=True):
        U, S, Vh = torch.linalg.svd(task.weight * delta, full_matrices=False)
        kept = min(share, task.delta.A.shape[0])
        left.append(U[:, :kept])
        values.append(S[:kept])
        right.append(Vh[:kept].T)
    return polar(torch.cat(left, dim=1)) @ torch.diag(torch.cat(values)) @ polar(torch.cat(right, dim=1)).T


@given(seeds)
def test_it_is_tsv_m_on_the_deltas(seed):
    tasks = layer_tasks(seed, ranks=[3, 3, 3])
    assert relative_error(dense(CoreSpace().merge(tasks)), reference(tasks, share=3)) < 1e-8


@given(seeds)
def test_of_mixed_ranks_each_task_gets_an_equal_share(seed):
    tasks = layer_tasks(seed, ranks=[2, 0, 1, 6])  # of the core's 9 dimensions 3 for each of the three that trained it
    assert relative_error(dense(CoreSpace().merge(tasks)), reference([tasks[0], *tasks[2:]], share=3)) < 1e-8


def test_tasks_in_orthogonal_spaces_add_up():
    """There is nothing to make orthogonal, and no interference."""
    identity = torch.eye(12)
    tasks = []
    for t, task in enumerate(layer_tasks(1, ranks=[3, 3, 3], width=12, out=12)):
        own = slice(4 * t, 4 * t + 4)
        A = task.delta.A[:, own] @ identity[own]
        B = identity[:, own] @ task.delta.B[own]
        tasks.append(replace(task, delta=LowRankDelta(A, B)))
    expected = dense(TaskArithmetic(scaling=1.0).merge(tasks))
    assert relative_error(dense(CoreSpace().merge(tasks)), expected) < 1e-6


def test_it_differs_from_the_sum_where_tasks_interfere():
    tasks = layer_tasks(2, ranks=[3, 3, 3])
    assert relative_error(dense(CoreSpace().merge(tasks)), dense(TaskArithmetic(1.0).merge(tasks))) > 0.05
