"""What a merge costs each task, against the outputs on the inputs themselves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_many.algebra.covariance import LowRankCovariance
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta, MergedDelta
from peft_many.algebra.residual import (
    effective_rank,
    effective_ranks_of_inputs,
    effective_ranks_of_outputs,
    relative_residuals,
)
from tests.algebra.problems import make_tasks, seeds, truncate
from tests.fake_gpu import fake_gpu


def relative_residual(merged, own, covariance):
    """Of one task, whatever the blocks of the merged delta are."""
    whole = MergedDelta(A=merged.A, B=merged.B, stacked=False)
    return relative_residuals(whole, [(own, covariance)]).item()


@given(seeds)
def test_residual_is_the_share_of_the_outputs_that_is_off(seed):
    tasks = make_tasks(seed)
    merge = LeastSquaresMerge()
    for task in tasks:
        merge.add(task.covariance, {"layer": task.delta}, task.weight)
    merged = merge.solve()["layer"]
    for task in tasks:
        own, found = (task.inputs @ delta.dense().T for delta in (task.delta, merged))
        expected = ((found - own).norm() / own.norm()).item()
        assert relative_residual(merged, task.delta, task.covariance) == pytest.approx(expected, rel=1e-6, abs=1e-8)


@given(seeds, st.sampled_from([None, 2]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_residuals_of_all_tasks_are_those_of_each(seed, rank, dtype):
    """In blocks, and where a rank or a rounding leaves none."""
    tasks = make_tasks(seed)
    merge = LeastSquaresMerge()
    for task in tasks:
        merge.add(task.covariance, {"layer": task.delta}, task.weight)
    merged = merge.solve(rank, dtype)["layer"]
    found = relative_residuals(merged, [(task.delta, task.covariance) for task in tasks]).tolist()
    expected = [relative_residual(merged, task.delta, task.covariance) for task in tasks]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)
    unknown = relative_residuals(merged, [(tasks[0].delta, None), *((t.delta, t.covariance) for t in tasks[1:])])
    unknown = unknown.tolist()
    assert math.isnan(unknown[0])
    assert unknown[1:] == found[1:]


@given(seeds)
def test_tasks_with_one_delta_lose_nothing_by_each_other(seed):
    """Their blocks cancel; so must what is left of them, in float64."""
    one, other = make_tasks(seed, tasks=2)
    merge = LeastSquaresMerge()
    for task in (one, other):
        merge.add(truncate(task.covariance, 0.9), {"layer": one.delta})
    merged = merge.solve()["layer"]
    assert relative_residuals(merged, [(one.delta, truncate(t.covariance, 0.9)) for t in (one, other)]).max() < 1e-6


@given(seeds)
def test_a_task_alone_loses_nothing_and_a_lost_delta_everything(seed):
    task = make_tasks(seed, tasks=1)[0]
    merge = LeastSquaresMerge()
    merge.add(task.covariance, {"layer": task.delta})
    assert relative_residual(merge.solve()["layer"], task.delta, task.covariance) < 1e-6
    nothing = LowRankDelta(A=task.delta.A[:0], B=task.delta.B[:, :0])
    assert relative_residual(nothing, task.delta, task.covariance) == pytest.approx(1.0)
    assert math.isnan(relative_residual(task.delta, nothing, task.covariance))


@given(seeds, st.sampled_from([0.5, 0.9]))
def test_truncated_covariances_count_their_remainder(seed, energy):
    task = make_tasks(seed)[0]
    cut = truncate(task.covariance, energy)
    half = LowRankDelta(A=task.delta.A, B=task.delta.B.clone())
    half.B[0] = 0.0  # of the outputs
    kept, whole = ((delta.dense() @ cut.dense() @ delta.dense().T).trace() for delta in (half, task.delta))
    assert relative_residual(half, task.delta, cut) ** 2 == pytest.approx(1 - (kept / whole).item(), rel=1e-6)


@given(st.integers(1, 20), st.floats(1e-6, 1e6))
def test_effective_rank_counts_equal_energies(count, size):
    energies = torch.cat([torch.full((count,), size), torch.zeros(3)])
    assert effective_rank(energies).item() == pytest.approx(count)


@given(st.lists(st.floats(0.0, 1e3), min_size=1, max_size=30))
def test_effective_rank_is_between_one_and_the_number_of_energies(values):
    found = effective_rank(torch.tensor(values, dtype=torch.float64)).item()
    if sum(values) > 0:
        assert 1 - 1e-9 <= found <= sum(value > 0 for value in values) * (1 + 1e-9)
    else:
        assert found == 0.0


@given(seeds)
def test_effective_ranks_are_those_of_the_spectra(seed):
    task = make_tasks(seed)[0]
    outputs = torch.linalg.eigvalsh(task.delta.dense() @ task.covariance.dense() @ task.delta.dense().T)
    moment = task.covariance.moment(task.delta.A)
    found = effective_ranks_of_outputs([task.delta], [moment]).item()
    assert found == pytest.approx(effective_rank(outputs).item(), rel=1e-4)
    inputs = torch.linalg.eigvalsh(task.covariance.dense())
    assert effective_ranks_of_inputs([task.covariance]).item() == pytest.approx(
        effective_rank(inputs).item(), rel=1e-6
    )


def test_the_remainder_spreads_over_all_directions():
    covariance = LowRankCovariance(remainder=2.0, factor=torch.zeros(1, 9))
    assert effective_ranks_of_inputs([covariance]).item() == pytest.approx(9)


def test_effective_ranks_of_tasks_together_are_those_of_each():
    """Of statistics and adapters of several ranks."""
    tasks = make_tasks(0)
    covariances = [tasks[0].covariance, truncate(tasks[1].covariance, 0.9), truncate(tasks[2].covariance, 0.5)]
    alone = torch.cat([effective_ranks_of_inputs([one]) for one in covariances])
    torch.testing.assert_close(effective_ranks_of_inputs(covariances), alone)
    deltas = [task.delta for task in tasks]
    moments = [one.moment(delta.A) for one, delta in zip(covariances, deltas)]
    alone = torch.cat([effective_ranks_of_outputs([one], [moment]) for one, moment in zip(deltas, moments)])
    torch.testing.assert_close(effective_ranks_of_outputs(deltas, moments), alone)


def test_on_a_gpu_nothing_waits_for_what_merging_costs():
    def on_gpu(*shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype, device="cuda:0")

    with fake_gpu() as counted:
        covariances = [LowRankCovariance(1.0, on_gpu(rank, 12), scale=2.0) for rank in (3, 5)]
        deltas = [LowRankDelta(A=on_gpu(rank, 12), B=on_gpu(7, rank)) for rank in (2, 3)]
        whole = MergedDelta(A=on_gpu(5, 12), B=on_gpu(7, 5))
        residuals = relative_residuals(whole, list(zip(deltas, covariances)))
        moments = [one.moment(delta.A) for one, delta in zip(covariances, deltas)]
        ranks = effective_ranks_of_inputs(covariances), effective_ranks_of_outputs(deltas, moments)
        assert {found.device.type for found in (residuals, *ranks)} == {"cuda"}
    assert not counted.waits
