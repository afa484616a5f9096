"""What must hold of covariances however they are held: each representation inherits these tests.

    class TestMine(MergingProperties):
        def statistic(self, inputs): ...

What is expected is computed in float64 from the statistic's own dense form, so that it holds of inexact ones too.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_many.algebra.covariance import Covariance, DenseCovariance, LowRankCovariance
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta
from peft_many.algebra.scatter import _by_cholesky, _in_span
from peft_many.algebra.sums import CovarianceSum, added_covariances, mean_covariance
from tests.algebra.problems import make_tasks, relative_error, seeds

RIDGE = 1e-4
TOLERANCE = 1e-5  # merged factors are float32
# Few examples for each of many classes; the same test runs in several of them.
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
token_counts = st.integers(2, 60)


@dataclass
class Task:
    """A task as the merge sees it: `C_t` in the representation under test, `ΔW_t`, and `w_t`."""

    covariance: Covariance
    delta: LowRankDelta
    weight: float


def merged(tasks: list[Task], ridge: float = RIDGE) -> Tensor:
    """What `LeastSquaresMerge` makes of the tasks, `(out, in)`."""
    return problem(tasks, ridge).solve()["layer"].dense()


def problem(tasks: list[Task], ridge: float = RIDGE) -> LeastSquaresMerge:
    made = LeastSquaresMerge(ridge)
    for task in tasks:
        made.add(task.covariance, {"layer": task.delta}, task.weight)
    return made


def ridged(task: Task) -> Tensor:
    """`w_t (C_t + λ mean(diag C_t) I)`, dense."""
    matrix = task.covariance.dense()
    return task.weight * (matrix + RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64))


def scatter(tasks: list[Task]) -> Covariance:
    """`R`, ridge inside."""
    parts = tuple((task.weight, task.covariance.with_ridge(RIDGE)) for task in tasks)
    return CovarianceSum(remainder=0.0, parts=parts)


def moments(tasks: list[Task]) -> Tensor:
    """`Σ_t w_t ΔW_t C_t`, ridge inside."""
    terms = [task.weight * task.covariance.with_ridge(RIDGE).product(task.delta.dense()) for task in tasks]
    return torch.stack(terms).sum(0)


def as_low_rank(covariance: Covariance) -> LowRankCovariance:
    """The same as a factor and a remainder; half of the least eigenvalue where it has no remainder of its own."""
    if isinstance(covariance, LowRankCovariance):
        return covariance
    values, vectors = torch.linalg.eigh(covariance.dense())
    least = values[0].item() / 2
    return LowRankCovariance(least, (values - least).sqrt()[:, None] * vectors.T)


class MergingProperties:
    """Order invariance, associativity, removal, scaling, and one result by every path; subclasses give `statistic`."""

    def statistic(self, inputs: Tensor) -> Covariance:
        """The covariance of inputs of shape `(tokens, in)`, float64, in the representation under test."""
        raise NotImplementedError

    def tasks(self, seed: int, tokens: int, count: int = 3) -> list[Task]:
        made = make_tasks(seed, tasks=count, tokens=tokens)
        return [Task(self.statistic(task.inputs), task.delta, task.weight) for task in made]

    @few
    @given(seeds, token_counts)
    def test_it_is_its_dense_form(self, seed, tokens):
        covariance = self.tasks(seed, tokens, count=1)[0].covariance
        matrix = covariance.dense()
        covariance.check()
        assert matrix.dtype == torch.float64
        assert matrix.shape == (covariance.width, covariance.width) == (12, 12)
        assert relative_error(matrix.T, matrix) < 1e-12
        assert torch.linalg.eigvalsh(matrix).min() > -1e-6 * covariance.trace
        assert math.isclose(covariance.trace, matrix.trace().item(), rel_tol=1e-6)
        rows = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
        assert relative_error(covariance.product(rows), rows.double() @ matrix) < 1e-12
        factor = covariance.factor_rows()
        assert factor.shape == (covariance.rank, 12)
        even = covariance.remainder * torch.eye(12, dtype=torch.float64)
        assert relative_error(factor.T @ factor + even, matrix) < 1e-6  # of which rounding to float32 may be a part
        total = torch.ones(12, 12, dtype=torch.float64)
        covariance.add_to(total, 0.3)
        assert relative_error(total.tril(), (1 + 0.3 * matrix).tril()) < 1e-12
        assert covariance.nbytes == sum(held.nbytes for held in covariance.tensors().values()) > 0
        expected = matrix + 0.01 * covariance.trace / 12 * torch.eye(12, dtype=torch.float64)
        assert relative_error(covariance.with_ridge(0.01).dense(), expected) < 1e-12

    @few
    @given(seeds, token_counts)
    def test_it_measures_the_inputs(self, seed, tokens):
        """Its trace is their energy, and what it says of a direction is near what they say."""
        inputs = make_tasks(seed, tasks=1, tokens=tokens)[0].inputs
        covariance = self.statistic(inputs)
        exact = inputs.T @ inputs / tokens
        assert math.isclose(covariance.trace, exact.trace().item(), rel_tol=1e-3)
        assert relative_error(covariance.dense(), exact) < 0.1

    @few
    @given(seeds, token_counts)
    def test_it_does_not_matter_in_which_order_tasks_come(self, seed, tokens):
        tasks = self.tasks(seed, tokens)
        expected = merged(tasks)
        for order in itertools.permutations(tasks):
            assert relative_error(merged(list(order)), expected) < TOLERANCE

    @few
    @given(seeds, token_counts)
    def test_it_adds_up_however_it_is_bracketed(self, seed, tokens):
        first, second, third = (task.covariance for task in self.tasks(seed, tokens))
        expected = first.dense() + 2 * second.dense() + 0.5 * third.dense()
        left = added_covariances([(1.0, added_covariances([(1.0, first), (2.0, second)])), (0.5, third)])
        right = added_covariances([(1.0, first), (2.0, added_covariances([(1.0, second), (0.25, third)]))])
        for found in (left, right):
            assert relative_error(found.dense(), expected) < 1e-6
        mean = mean_covariance([first, second, third], [1, 2, 5])
        assert relative_error(mean.dense(), (first.dense() + 2 * second.dense() + 5 * third.dense()) / 8) < 1e-6

    @few
    @given(seeds, token_counts, st.integers(1, 3))
    def test_merging_merges_is_merging_their_tasks(self, seed, tokens, split):
        """A merge stands for its tasks by its delta, their mean covariance and the sum of their weights."""
        tasks = self.tasks(seed, tokens, count=4)
        halves = []
        for half in (tasks[:split], tasks[split:]):
            whole = sum(task.weight for task in half)
            mean = added_covariances([(task.weight / whole, task.covariance) for task in half])
            halves.append(Task(mean, problem(half).solve()["layer"], whole))
        assert relative_error(merged(halves), merged(tasks)) < TOLERANCE

    @few
    @given(seeds, token_counts)
    def test_what_is_added_and_removed_was_never_there(self, seed, tokens):
        """By subtracting its terms of `R` and of the moments, as by giving it no weight, as by leaving it out."""
        *others, last = self.tasks(seed, tokens)
        expected = merged(others)
        gone = (-last.weight, last.covariance.with_ridge(RIDGE))
        back = CovarianceSum(remainder=0.0, parts=((1.0, scatter([*others, last])), gone))
        assert relative_error(back.dense(), scatter(others).dense()) < 1e-9
        left = moments([*others, last]) - last.weight * gone[1].product(last.delta.dense())
        assert relative_error(torch.linalg.solve(back.dense(), left.T).T, expected) < TOLERANCE
        weightless = Task(last.covariance, last.delta, 0.0)
        for place in range(3):
            assert relative_error(merged([*others[:place], weightless, *others[place:]]), expected) < TOLERANCE

    @few
    @given(seeds, token_counts, st.floats(1e-3, 1e3))
    def test_weights_are_relative(self, seed, tokens, factor):
        tasks = self.tasks(seed, tokens)
        scaled = [Task(task.covariance, task.delta, factor * task.weight) for task in tasks]
        assert relative_error(merged(scaled), merged(tasks)) < TOLERANCE
        # A task of twice the weight is a task that came twice.
        heavy = [Task(tasks[0].covariance, tasks[0].delta, 2 * tasks[0].weight), *tasks[1:]]
        assert relative_error(merged([tasks[0], *tasks]), merged(heavy)) < TOLERANCE

    @few
    @given(seeds, token_counts)
    def test_every_path_leads_to_the_same_merge(self, seed, tokens):
        """The two exact forms of the solve, the definition, and after each task the recursion of the paper."""
        tasks = self.tasks(seed, tokens)
        R = torch.zeros(12, 12, dtype=torch.float64)
        recursive = torch.zeros(7, 12, dtype=torch.float64)
        for t, task in enumerate(tasks):
            # R_t = R_{t−1} + w_t C_t, K_t = w_t C_t R_t⁻¹, ΔW*_t = ΔW*_{t−1} (I − K_t) + ΔW_t K_t
            R = R + ridged(task)
            gain = torch.linalg.solve(R, ridged(task), left=False)
            recursive = recursive - recursive @ gain + task.delta.dense() @ gain
            assert relative_error(merged(tasks[: t + 1]), recursive) < TOLERANCE
        blocks = [(t, task.delta.A) for t, task in enumerate(tasks)]
        parts = [(task.weight, task.covariance.with_ridge(RIDGE)) for task in tasks]
        whole = [(weight, DenseCovariance(0.0, part.dense())) for weight, part in parts]
        factored = [(weight, as_low_rank(part)) for weight, part in parts]
        cpu, B = torch.device("cpu"), torch.cat([task.delta.B for task in tasks], dim=1).double()
        for rows in (
            _by_cholesky(parts, blocks, cpu),
            _by_cholesky(whole, blocks, cpu),
            _in_span(factored, blocks, cpu)[0],
        ):
            found = B @ rows
            assert relative_error(found, recursive) < TOLERANCE

    @few
    @given(seeds, token_counts)
    def test_one_task_comes_back_and_equal_deltas_stay(self, seed, tokens):
        tasks = self.tasks(seed, tokens)
        own = tasks[0].delta
        assert relative_error(merged(tasks[:1]), own.dense()) < TOLERANCE
        equal = [Task(task.covariance, own, task.weight) for task in tasks]
        assert relative_error(merged(equal), own.dense()) < TOLERANCE
