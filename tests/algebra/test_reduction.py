"""Merged deltas of a chosen rank, and factors that float32 can hold."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_many.algebra.covariance import LowRankCovariance
from peft_many.algebra.lpm import LARGEST_ROUNDING_LOSS, LeastSquaresMerge, LowRankDelta
from peft_many.algebra.reduction import nearest_of_rank, orthonormal, padded, rounding_loss
from tests.algebra.problems import make_tasks, objective, optimum, relative_error, seeds

RIDGE = 1e-4


def merge(tasks, rank=None, ridge=RIDGE):
    problem = LeastSquaresMerge(ridge)
    for task in tasks:
        problem.add(task.covariance, {"layer": task.delta}, task.weight)
    return problem.solve(rank)["layer"]


def scatter(tasks):
    total = 0
    for task in tasks:
        covariance = task.covariance.with_ridge(RIDGE).dense()
        total = total + task.weight * covariance
    return total


@given(seeds, st.integers(1, 7))
@settings(deadline=None)
def test_the_rank_is_the_best_one_under_the_objective(seed, rank):
    """Against the reduced-rank regression of textbooks: truncate ΔW* R^½ by SVD and map back."""
    tasks = make_tasks(seed)
    found = merge(tasks, rank)
    assert found.A.shape == (rank, 12)
    assert found.B.shape == (7, rank)
    values, vectors = torch.linalg.eigh(scatter(tasks))
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    U, S, Vh = torch.linalg.svd(optimum(tasks, RIDGE) @ root, full_matrices=False)
    expected = (U[:, :rank] * S[:rank]) @ Vh[:rank] @ inverse
    gap = objective(tasks, found.dense(), RIDGE) - objective(tasks, expected, RIDGE)
    assert abs(gap) < 1e-5 * objective(tasks, torch.zeros(7, 12).double(), RIDGE)


@given(seeds, st.integers(1, 6))
@settings(deadline=None)
def test_plain_svd_of_the_merged_delta_is_no_better(seed, rank):
    tasks = make_tasks(seed)
    U, S, Vh = torch.linalg.svd(optimum(tasks, RIDGE), full_matrices=False)
    plain = objective(tasks, (U[:, :rank] * S[:rank]) @ Vh[:rank], RIDGE)
    assert objective(tasks, merge(tasks, rank).dense(), RIDGE) <= plain * (1 + 1e-6)


def test_plain_svd_is_worse_where_inputs_are_uneven():
    tasks = make_tasks(3)
    U, S, Vh = torch.linalg.svd(optimum(tasks, RIDGE), full_matrices=False)
    floor = objective(tasks, optimum(tasks, RIDGE), RIDGE)
    plain = objective(tasks, (U[:, :2] * S[:2]) @ Vh[:2], RIDGE) - floor
    assert objective(tasks, merge(tasks, 2).dense(), RIDGE) - floor < 0.7 * plain


@given(seeds)
@settings(deadline=None)
def test_enough_rank_is_the_optimum_itself(seed):
    tasks = make_tasks(seed, rank=1)  # 1 + 2 + 3
    assert relative_error(merge(tasks, 6).dense(), optimum(tasks, RIDGE)) < 1e-6
    assert merge(tasks, 6).stacked
    assert merge(tasks, 7).stacked


def test_more_rank_is_never_worse_and_smaller_ranks_are_parts_of_larger_ones():
    tasks = make_tasks(5)
    deltas = [merge(tasks, rank) for rank in range(1, 8)]
    losses = [objective(tasks, delta.dense(), RIDGE) for delta in deltas]
    assert losses == sorted(losses, reverse=True)
    for smaller, larger in itertools.pairwise(deltas):
        assert relative_error(larger.A[: len(smaller.A)], smaller.A.double()) < 1e-4


def test_blocks_that_cancel_are_stored_otherwise():
    """Tasks whose strongest input directions differ a little: rows of A* are far larger than the merged delta."""
    generator = torch.Generator().manual_seed(0)
    direction, other = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    delta = LowRankDelta(torch.randn(3, 40, generator=generator), torch.randn(7, 3, generator=generator))
    problem, reference = LeastSquaresMerge(ridge=0.0), [0, 0]
    for angle in (0.0, 1e-3, -2e-3):
        factor = 1e4 * (direction + angle * other)[None]
        covariance = LowRankCovariance(remainder=1.0, factor=factor)
        own = LowRankDelta(delta.A + 1e-6 * angle, delta.B)
        problem.add(covariance, {"layer": own})
        reference = [reference[0] + own.dense() @ covariance.dense(), reference[1] + covariance.dense()]
    expected = torch.linalg.solve(reference[1], reference[0].T).T
    merged = problem.solve()["layer"]
    assert not merged.stacked
    assert relative_error(merged.dense(), expected) < 1e-5
    gram = merged.B.T @ merged.B
    assert torch.allclose(gram, torch.diag((gram.diagonal() > 0.5).float()), atol=1e-5)


@given(seeds, st.sampled_from([(5, 9), (9, 5), (6, 6)]), st.integers(1, 8), st.sampled_from([0, -8]))
def test_the_nearest_delta_of_a_rank_is_that_of_the_svd(seed, shape, rank, decades):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.logspace(0, decades, shape[1], dtype=torch.float64)
    delta = torch.randn(shape, generator=generator, dtype=torch.float64) * spectrum
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    expected = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    A, B = nearest_of_rank(delta, rank)
    assert (A.shape, B.shape) == ((rank, shape[1]), (shape[0], rank))
    lost, least = (delta - B @ A).norm(), (delta - expected).norm()
    assert lost <= least * (1 + 1e-9) + 1e-8 * delta.norm()


def test_padding_adds_nothing():
    A, B = torch.randn(2, 5), torch.randn(4, 2)
    wide = padded(A, B, 3)
    assert [tuple(factor.shape) for factor in wide] == [(3, 5), (4, 3)]
    assert torch.equal(wide[1] @ wide[0], B @ A)


@given(seeds, st.integers(1, 12))
def test_orthonormal_factors_hold_the_same_delta_in_the_announced_shape(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, 9, generator=generator).double(), torch.randn(5, rank, generator=generator)
    one, two = orthonormal(A, B)
    assert (one.shape, two.shape) == (A.shape, B.shape)
    assert relative_error(two @ one, B.double() @ A) < 1e-12


def test_rounding_loss_is_that_of_the_product():
    A = torch.tensor([[1e8, 1.0], [-1e8, 0.5]]).double() + 1e-3
    B = torch.ones(3, 2)
    lost = (B.double() @ (A - A.float().double())).norm() / (B.double() @ A).norm()
    assert abs(rounding_loss(A, B, torch.float32) - lost.item()) < 1e-6
    assert rounding_loss(A, B, torch.float32) > LARGEST_ROUNDING_LOSS[torch.float32]
    assert rounding_loss(torch.zeros(2, 2).double(), B, torch.float32) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_loss_counts_both_factors(dtype):
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 9, generator=generator).double(), torch.randn(5, 3, generator=generator)
    lost = (B.double() @ A - B.to(dtype).double() @ A.to(dtype).double()).norm() / (B.double() @ A).norm()
    assert rounding_loss(A, B, dtype) == pytest.approx(lost.item(), rel=1e-6)
    assert rounding_loss(A * 1e39, B, dtype) == float("inf")
