"""KnOTS-TIES in the factors' small space against an SVD of the dense deltas."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_many.methods import Knots, LayerTask
from peft_many.methods.knots import left_singular_vectors
from tests.methods.layers import dense, dense_deltas, layer_tasks, relative_error, seeds, ties_reference


def reference(tasks: list[LayerTask], density: float) -> Tensor:
    """`U · TIES(Σ V_1ᵀ, …)` of the SVD of `[ΔW_1 … ΔW_T]`, dense, with a TIES of its own."""
    deltas = dense_deltas(tasks)
    U, S, Vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    kept = 1e-10 * S[0] < S
    aligned = (S[kept, None] * Vh[kept]).split(deltas[0].shape[1], dim=1)
    return U[:, kept] @ ties_reference(aligned, [task.weight for task in tasks], density)


@given(seeds, st.sampled_from([0.2, 0.6, 1.0]))
def test_it_is_what_the_dense_svd_gives(seed, density):
    tasks = layer_tasks(seed, ranks=[2, 1, 3], width=8, out=9)
    assert relative_error(dense(Knots(density).merge(tasks)), reference(tasks, density)) < 1e-8


@given(seeds)
def test_more_ranks_than_outputs(seed):
    tasks = layer_tasks(seed, ranks=[2, 3], width=8, out=4)
    assert relative_error(dense(Knots().merge(tasks)), reference(tasks, 0.2)) < 1e-8


@given(seeds)
def test_the_basis_is_that_of_the_concatenated_deltas(seed):
    tasks = layer_tasks(seed)
    deltas = dense_deltas(tasks)
    U, S, _ = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    found = left_singular_vectors([task.delta for task in tasks])
    assert found.shape == (11, 9)
    assert (found.T @ U[:, :9]).abs().allclose(torch.eye(9, dtype=torch.float64), atol=1e-8)
    assert torch.cat([found.T @ delta for delta in deltas], dim=1).norm(dim=1).allclose(S[:9])


def test_dependent_directions_are_left_out():
    (task,) = layer_tasks(0, ranks=[3])
    assert left_singular_vectors([task.delta, task.delta]).shape == (11, 3)


def test_it_differs_from_ties_on_the_deltas():
    tasks = layer_tasks(1)
    plain = ties_reference(dense_deltas(tasks), [task.weight for task in tasks], 0.2)
    assert relative_error(dense(Knots().merge(tasks)), plain) > 0.1
