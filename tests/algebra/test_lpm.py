"""LPM against its definition: the optimum, its low rank, ridges, and what is refused (see `properties.py` too)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_many.algebra.covariance import DenseCovariance
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta, SingularMergeError
from tests.algebra.problems import Task, make_tasks, objective, optimum, relative_error, seeds, truncate

RIDGE = 1e-4


def merge(tasks: list[Task], ridge: float = RIDGE, energy: float | None = None) -> LowRankDelta:
    problem = LeastSquaresMerge(ridge)
    for task in tasks:
        covariance = task.covariance if energy is None else truncate(task.covariance, energy, torch.float64)
        problem.add(covariance, {"layer": task.delta}, task.weight)
    return problem.solve()["layer"]


@pytest.mark.parametrize("tokens", [1, 5, 12, 200])
@pytest.mark.parametrize("ridge", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("energy", [None, 1.0])
def test_merge_is_the_fp64_optimum_even_where_few_tokens_were_seen(tokens, ridge, energy):
    tasks = make_tasks(seed=tokens, width=12, tokens=tokens)
    assert relative_error(merge(tasks, ridge, energy).dense(), optimum(tasks, ridge)) < 1e-5


@given(seeds, st.integers(1, 5), st.integers(1, 60), st.sampled_from([1e-5, 1e-3]))
def test_no_other_delta_has_a_smaller_objective(seed, count, tokens, ridge):
    tasks = make_tasks(seed, tasks=count, tokens=tokens)
    best = merge(tasks, ridge).dense()
    value = objective(tasks, best, ridge)
    generator = torch.Generator().manual_seed(seed)
    for scale in (1e-3, 1e-1):
        step = (
            scale
            * best.norm()
            * torch.nn.functional.normalize(
                torch.randn(best.shape, generator=generator, dtype=torch.float64), dim=None
            )
        )
        assert objective(tasks, best + step, ridge) >= value * (1 - 1e-6)


def test_the_merge_is_exactly_low_rank_with_the_tasks_own_B():
    tasks = make_tasks(seed=1)
    merged = merge(tasks)
    assert merged.A.shape == (2 + 3 + 4, 12)
    assert merged.A.dtype == torch.float32
    assert torch.equal(merged.B, torch.cat([task.delta.B for task in tasks], dim=1))


def test_layers_that_share_an_input_are_merged_each_for_itself():
    tasks = make_tasks(seed=3)
    problem = LeastSquaresMerge(RIDGE)
    for task in tasks:
        twice = LowRankDelta(A=2 * task.delta.A, B=task.delta.B)
        problem.add(task.covariance, {"q": task.delta, "k": twice}, task.weight)
    merged = problem.solve()
    assert relative_error(merged["q"].dense(), optimum(tasks, RIDGE)) < 1e-5
    assert relative_error(merged["k"].dense(), 2 * optimum(tasks, RIDGE)) < 1e-5


def test_a_layer_that_a_task_did_not_train_counts_as_zero_there():
    tasks = make_tasks(seed=4)
    problem = LeastSquaresMerge(RIDGE)
    for t, task in enumerate(tasks):
        problem.add(task.covariance, {} if t == 1 else {"layer": task.delta}, task.weight)
    tasks[1].delta = LowRankDelta(A=torch.zeros(1, 12), B=torch.zeros(7, 1))
    merged = problem.solve()["layer"]
    assert merged.A.shape[0] == 2 + 4
    assert relative_error(merged.dense(), optimum(tasks, RIDGE)) < 1e-5


def test_unseen_directions_get_the_mean_delta():
    width = 6
    seen = torch.zeros(width, dtype=torch.float64)
    seen[0] = 1.0
    deltas = [LowRankDelta(A=torch.randn(1, width), B=torch.randn(3, 1)) for _ in range(2)]
    problem = LeastSquaresMerge(RIDGE)
    for delta in deltas:
        problem.add(DenseCovariance(remainder=0.0, matrix=torch.outer(seen, seen)), {"layer": delta})
    mean = (deltas[0].dense() + deltas[1].dense()) / 2
    assert relative_error(problem.solve()["layer"].dense(), mean) < 1e-5


def test_a_layer_that_no_token_reached_gets_the_mean_delta():
    deltas = [LowRankDelta(A=torch.randn(1, 4), B=torch.randn(3, 1)) for _ in range(2)]
    problem = LeastSquaresMerge(RIDGE)
    for delta in deltas:
        problem.add(DenseCovariance(remainder=0.0, matrix=torch.zeros(4, 4)), {"layer": delta})
    assert relative_error(problem.solve()["layer"].dense(), (deltas[0].dense() + deltas[1].dense()) / 2) < 1e-6


def test_a_task_of_no_weight_has_no_say_even_where_it_is_alone():
    (task,) = make_tasks(seed=8, tasks=1)
    task.weight = 0.0
    assert torch.equal(merge([task]).dense(), torch.zeros(7, 12, dtype=torch.float64))


@pytest.mark.parametrize("energy", [None, 1.0])
def test_without_a_ridge_unseen_directions_are_an_error_and_not_noise(energy):
    with pytest.raises(SingularMergeError, match="ridge"):
        merge(make_tasks(seed=5, tokens=1), ridge=0.0, energy=energy)


def test_without_a_ridge_the_optimum_is_found_where_it_exists():
    tasks = make_tasks(seed=6, tokens=100)
    assert relative_error(merge(tasks, ridge=0.0).dense(), optimum(tasks, 0.0)) < 1e-5


def test_inputs_of_another_width_are_refused():
    (task,) = make_tasks(seed=7, tasks=1)
    problem = LeastSquaresMerge()
    problem.add(task.covariance, {"layer": task.delta})
    with pytest.raises(ValueError, match="width 5"):
        problem.add(DenseCovariance(remainder=0.0, matrix=torch.eye(5)), {})


@pytest.mark.parametrize("rank", [None, 3, 5, 8, 9, 40])
@pytest.mark.parametrize("ranks", [(9,), (9, 2), (4, 4), (1, 8)])
def test_ranks_beyond_that_of_the_layer(ranks, rank):
    """A layer of 8 outputs has no delta of more than that rank; several such are merged to what a layer can have."""
    generator = torch.Generator().manual_seed(0)
    problem, wanted = LeastSquaresMerge(1e-4), 0
    for r in ranks:
        rows = torch.randn(20, 10, dtype=torch.float64, generator=generator)
        pair = LowRankDelta(torch.randn(r, 10, generator=generator), torch.randn(8, r, generator=generator))
        problem.add(DenseCovariance(0.0, rows.T @ rows / 20), {"layer": pair})
        wanted += r
    whole = min(wanted, 8) if len(ranks) > 1 and max(ranks) >= 8 else wanted
    merged = problem.solve(rank)["layer"]
    assert merged.A.shape[0] == merged.B.shape[1] == (whole if rank is None else min(whole, rank))
    if rank is None or rank >= 8:
        exact = problem.solve()["layer"].dense()
        assert (merged.dense() - exact).norm() < 1e-5 * exact.norm()
