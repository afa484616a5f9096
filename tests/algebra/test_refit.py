"""The refit of one layer against least squares by another solver, and its optimum among deltas of a rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu.launches import launches
from peft_many.algebra import scatter
from peft_many.algebra.devices import numbers_of
from peft_many.algebra.lpm import LowRankDelta
from peft_many.algebra.refit import LayerRefit
from peft_many.algebra.scatter import SingularMergeError
from tests.algebra.problems import make_tasks, optimum, relative_error, seeds


def observed(seed, tasks):
    """Targets that no delta reaches."""
    generator = torch.Generator().manual_seed(seed)
    return [
        task.inputs @ task.delta.dense().T
        + torch.randn(len(task.inputs), task.delta.B.shape[0], generator=generator, dtype=torch.float64)
        for task in tasks
    ]


def refit(tasks, targets, ridge):
    problem = LayerRefit(tasks[0].delta.B.shape[0], tasks[0].inputs.shape[1], ridge)
    for task, wanted in zip(tasks, targets):
        problem.add(task.inputs, wanted, task.delta, task.weight)
    return problem


def objective(tasks, targets, ridge, delta):
    total = 0.0
    for task, wanted in zip(tasks, targets):
        pull = ridge * task.inputs.square().mean().item()
        fit = (task.inputs @ delta.T - wanted).square().sum() / len(wanted)
        total += task.weight * (fit + pull * (delta - task.delta.dense()).square().sum())
    return total.item()


def by_least_squares(tasks, targets, ridge):
    """The same problem as rows of one long system, for a solver that knows nothing of moments."""
    rows, wanted = [], []
    for task, target in zip(tasks, targets):
        width = task.inputs.shape[1]
        scale = (task.weight / len(task.inputs)) ** 0.5
        pull = (task.weight * ridge * task.inputs.square().mean().item()) ** 0.5
        rows += [scale * task.inputs, pull * torch.eye(width, dtype=torch.float64)]
        wanted += [scale * target, pull * task.delta.dense().T]
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted), driver="gelsd").solution.T


@given(seeds, st.sampled_from([1e-6, 1e-2, 1.0]))
def test_it_is_the_least_squares_solution(seed, ridge):
    tasks = make_tasks(seed)
    targets = observed(seed, tasks)
    found = refit(tasks, targets, ridge).solve(rank=7).dense()
    assert relative_error(found, by_least_squares(tasks, targets, ridge)) < 1e-8


@given(seeds)
def test_with_the_deltas_own_outputs_it_is_lpm(seed):
    tasks = make_tasks(seed)
    targets = [task.inputs @ task.delta.dense().T for task in tasks]
    assert relative_error(refit(tasks, targets, 1e-3).solve(rank=7).dense(), optimum(tasks, 1e-3)) < 1e-8


@given(seeds, st.integers(1, 6))
def test_no_delta_of_the_rank_is_better(seed, rank):
    tasks = make_tasks(seed)
    targets = observed(seed, tasks)
    problem = refit(tasks, targets, 1e-2)
    found, whole = problem.solve(rank), problem.solve(7).dense()
    assert found.A.shape[0] == found.B.shape[1] == rank
    best = objective(tasks, targets, 1e-2, found.dense())
    U, S, Vh = torch.linalg.svd(whole)
    plain = U[:, :rank] * S[:rank] @ Vh[:rank]
    assert best <= objective(tasks, targets, 1e-2, plain) * (1 + 1e-9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        A = found.A + 1e-3 * torch.randn(found.A.shape, generator=generator, dtype=torch.float64)
        B = found.B + 1e-3 * torch.randn(found.B.shape, generator=generator, dtype=torch.float64)
        assert best <= objective(tasks, targets, 1e-2, B @ A) * (1 + 1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(value):
    (task,) = make_tasks(0, tasks=1)
    broken = task.inputs.clone()
    broken[3, 2] = value
    problem = LayerRefit(7, 12, 1e-2)
    for inputs, targets in ((broken, task.inputs[:, :7]), (task.inputs, broken[:, :7])):
        with pytest.raises(FloatingPointError):
            problem.add(inputs, targets, task.delta)


def test_too_few_tokens_without_a_ridge_are_an_error():
    problem = LayerRefit(2, 5, ridge=0.0)
    own = LowRankDelta(A=torch.ones(1, 5), B=torch.ones(2, 1))
    problem.add(torch.ones(1, 5), torch.ones(1, 2), own)
    with pytest.raises(SingularMergeError, match="larger `ridge`"):
        problem.solve(1)


def test_tokens_may_be_added_in_parts():
    tasks = make_tasks(3)
    targets = observed(3, tasks)
    whole, parts = refit(tasks, targets, 1e-2), LayerRefit(7, 12, 1e-2)
    for task, wanted in zip(tasks, targets):
        for x, d in zip(task.inputs.split(9), wanted.split(9)):
            parts.add(x, d, task.delta, task.weight * len(x) / len(task.inputs))
    assert relative_error(parts.solve(3).dense(), whole.solve(3).dense()) < 1e-9


def test_a_rank_that_the_targets_do_not_reach_is_filled_up_with_zeros():
    task = make_tasks(0, tasks=1)[0]
    found = refit([task], [torch.zeros(len(task.inputs), 7).double()], 0.0).solve(4)
    assert found.A.isfinite().all()
    assert not found.dense().any()


def test_the_host_waits_once_for_each_part_and_once_to_solve(monkeypatch):
    """To see that numbers are finite, and that the sum can be factored."""
    asked = []
    monkeypatch.setattr(scatter, "numbers_of", lambda tensors: asked.append(len(tensors)) or numbers_of(tensors))
    task, problem = make_tasks(0, tasks=1)[0], LayerRefit(7, 12, 1e-2)
    wanted = observed(0, [task])[0]
    assert launches(lambda: problem.add(task.inputs, wanted, task.delta)).waits.total() == 1
    assert launches(lambda: problem.solve(3)).waits.total() == 0
    assert asked == [1]
