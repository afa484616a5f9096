"""RegMean against its definition, in both of its forms."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_many.algebra.covariance import DenseCovariance, LowRankCovariance
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta
from peft_many.algebra.scatter import SingularMergeError
from peft_many.methods import LayerTask, RegMean
from tests.algebra.problems import truncate
from tests.methods.layers import dense, layer_tasks, relative_error, seeds


def reference(tasks: list[LayerTask], alpha: float) -> Tensor:
    """`(Σ w W G)(Σ w G)⁻¹` with the off-diagonal entries of each `G` times `alpha`."""
    moments, scatter = 0, 0
    for task in tasks:
        C = task.covariance.dense()
        gram = alpha * C + (1 - alpha) * torch.diag(C.diagonal())
        moments, scatter = moments + task.weight * task.delta.dense() @ gram, scatter + task.weight * gram
    return moments @ torch.inverse(scatter)


def low_rank(tasks: list[LayerTask], rank: int) -> list[LayerTask]:
    return [replace(task, covariance=truncate(task.covariance, 1.0, torch.float64, rank=rank)) for task in tasks]


@given(seeds, st.sampled_from([0.1, 0.9, 1.0]))
def test_it_is_the_closed_form(seed, alpha):
    tasks = layer_tasks(seed, ranks=[2, 0, 4])
    assert relative_error(dense(RegMean(alpha).merge(tasks)), reference(tasks, alpha)) < 1e-8


@given(seeds, st.sampled_from([0.1, 0.9, 0.999, 1.0]))
def test_it_is_the_closed_form_in_the_span_of_low_rank_statistics(seed, alpha):
    tasks = low_rank(layer_tasks(seed, ranks=[2, 0, 4], width=40), rank=3)
    method = RegMean(alpha)
    assert relative_error(dense(method.merge(tasks)), reference(tasks, alpha)) < 1e-8
    in_span = method._in_span(tasks, [task.covariance for task in tasks])
    dense_form = method._by_cholesky(tasks, [task.covariance for task in tasks])
    assert relative_error(in_span, dense_form) < 1e-8


def test_the_span_is_taken_where_it_is_cheaper(monkeypatch):
    tasks = low_rank(layer_tasks(0, width=40), rank=3)
    monkeypatch.setattr(RegMean, "_by_cholesky", None)
    RegMean().merge(tasks)


def test_alpha_is_what_sets_it_apart():
    tasks = layer_tasks(1)
    assert relative_error(reference(tasks, 0.9), reference(tasks, 1.0)) > 0.01


def test_with_alpha_one_it_is_lpm_without_a_ridge():
    tasks = layer_tasks(2)
    problem = LeastSquaresMerge(ridge=0.0)
    for task in tasks:
        problem.add(task.covariance, {"layer": task.delta}, task.weight)
    expected = problem.solve()["layer"].dense()
    assert relative_error(dense(RegMean(alpha=1.0).merge(tasks)), expected) < 1e-5


@pytest.mark.parametrize("form", ["dense", "span"])
def test_inputs_that_no_task_uses_get_the_mean_delta(form):
    tasks = []
    for task in layer_tasks(3, width=40):
        C = task.covariance.dense()
        C[5], C[:, 5] = 0, 0
        covariance = DenseCovariance(remainder=0.0, matrix=C)
        if form == "span":
            rows = truncate(covariance, 1.0, torch.float64).factor_rows()[:4]
            covariance = LowRankCovariance(remainder=0.0, factor=rows * (torch.arange(40) != 5))
        tasks.append(replace(task, covariance=covariance))
    merged = dense(RegMean().merge(tasks))
    total = sum(task.weight for task in tasks)
    mean = sum(task.weight / total * task.delta.dense() for task in tasks)
    assert relative_error(merged[:, 5], mean[:, 5]) < 1e-8
    assert relative_error(merged, mean) > 0.01


def test_where_nobody_saw_anything_it_is_the_mean():
    nothing = LowRankCovariance(remainder=0.0, factor=torch.zeros(0, 14))
    tasks = [replace(task, covariance=nothing) for task in layer_tasks(4)]
    total = sum(task.weight for task in tasks)
    mean = sum(task.weight / total * task.delta.dense() for task in tasks)
    assert relative_error(dense(RegMean().merge(tasks)), mean) < 1e-10


@pytest.mark.parametrize("form", ["dense", "span"])
def test_with_alpha_one_unseen_directions_are_an_error(form):
    factor = torch.ones(1, 14)
    covariance = LowRankCovariance(remainder=0.0, factor=factor)
    if form == "dense":
        covariance = DenseCovariance(remainder=0.0, matrix=factor.T @ factor)
    tasks = [LayerTask(LowRankDelta(torch.ones(2, 14), torch.ones(11, 2)), 1.0, covariance)]
    with pytest.raises(SingularMergeError, match="alpha"):
        RegMean(alpha=1.0).merge(tasks)
