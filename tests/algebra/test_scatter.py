"""The two exact forms of the solve, and which is taken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_many.algebra import scatter
from peft_many.algebra.covariance import LowRankCovariance
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta
from tests.algebra.problems import relative_error, seeds


def problem(seed, tasks, rank, width, half=False):
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(tasks):
        factor = torch.randn(rank, width, generator=generator) * torch.logspace(0, -3, rank)[:, None]
        covariance = LowRankCovariance(remainder=1e-4, factor=factor)
        parts.append((0.5, covariance.in_half_precision() if half else covariance))
    blocks = [(t, torch.randn(3, width, generator=generator)) for t in range(tasks) for _ in range(2)]
    return parts, blocks


def dense_solution(parts, blocks):
    inverse = torch.linalg.inv(sum(weight * part.dense() for weight, part in parts))
    return torch.cat([parts[t][0] * A.double() @ parts[t][1].dense() @ inverse for t, A in blocks])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("tasks", "rank", "width"), [(2, 3, 40), (6, 120, 900), (6, 120, 600), (3, 1, 700)])
def test_both_forms_give_the_dense_solution(tasks, rank, width, half):
    """Also beyond one block of the symmetric products."""
    parts, blocks = problem(0, tasks, rank, width, half)
    expected = dense_solution(parts, blocks)
    assert relative_error(scatter._in_span(parts, blocks, torch.device("cpu"))[0], expected) < 1e-9
    assert relative_error(scatter._by_cholesky(parts, blocks, torch.device("cpu")), expected) < 1e-9


@given(seeds, st.integers(2, 64), st.integers(1, 64), st.integers(1, 64))
@settings(deadline=None)
def test_the_cost_model_prefers_the_smaller_matrix(seed, width, rank, rows):
    if 2 * rank <= width:
        assert scatter.span_is_cheaper(width, rank, rows)
    if rank >= 2 * width:
        assert not scatter.span_is_cheaper(width, rank, rows)
    assert scatter.multiplications(width, rank, rows) <= min(
        scatter._multiplications_in_span(width, rank, rows), scatter._multiplications_by_cholesky(width, rank, rows)
    )


@pytest.mark.parametrize(("rank", "form"), [(3, "_in_span"), (60, "_by_cholesky")])
def test_merging_takes_the_cheaper_form(monkeypatch, rank, form):
    calls = []
    real = getattr(scatter, form)
    monkeypatch.setattr(scatter, form, lambda *arguments: calls.append(1) or real(*arguments))
    parts, _ = problem(1, 3, rank, 40)
    merge = LeastSquaresMerge()
    for _, covariance in parts:
        merge.add(covariance, {"layer": LowRankDelta(torch.randn(2, 40), torch.randn(5, 2))})
    merge.solve()
    assert calls == [1]
