"""Truncation keeps the trace, and no more directions than it must: for a share of the energy, or an error budget."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_many.algebra.covariance import DenseCovariance
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta
from peft_many.algebra.sketch import CovarianceAccumulator
from peft_many.algebra.spectrum import Spectrum, Truncation, eigen_directions
from tests.algebra.problems import make_tasks, relative_error, seeds, truncate
from tests.algebra.test_sketch import WIDTH, exact, inputs


@given(seeds, st.floats(0.05, 1.0), st.integers(1, 30))
def test_truncation_keeps_the_trace_and_enough_energy_and_no_more_directions_than_needed(seed, energy, tokens):
    covariance = make_tasks(seed, tasks=1, tokens=tokens)[0].covariance
    kept = truncate(covariance, energy, torch.float64)
    eigenvalues = torch.linalg.eigvalsh(covariance.dense()).flip(0).clamp(min=0)
    rank = len(kept.factor)
    assert math.isclose(kept.trace, covariance.trace, rel_tol=1e-9)
    assert eigenvalues[:rank].sum() >= energy * eigenvalues.sum() * (1 - 1e-9)
    assert rank == 1 or eigenvalues[: rank - 1].sum() < energy * eigenvalues.sum()
    assert torch.allclose(torch.linalg.eigvalsh(kept.dense()).flip(0)[:rank], eigenvalues[:rank], rtol=1e-6)
    assert kept.remainder >= 0
    kept.check()


def test_energy_one_loses_nothing():
    covariance = make_tasks(1, tasks=1, tokens=5)[0].covariance
    assert relative_error(truncate(covariance, 1.0, torch.float64).dense(), covariance.dense()) < 1e-12


def test_nothing_seen_stays_a_covariance():
    truncate(CovarianceAccumulator(3).result(), 0.9).check()


@pytest.mark.parametrize(
    "wrong",
    [
        {"energy": 0.0},
        {"energy": -0.1},
        {"energy": 1.1},
        {"rank": 0},
        {"error_budget": 0.0},
        {"error_budget": -1.0},
        {"error_budget": math.nan},
        {"dtype": torch.float32},
        {"dtype": torch.int8, "energy": 1.0},
    ],
)
def test_a_truncation_checks_itself(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Truncation(**wrong)


@pytest.mark.parametrize(
    ("options", "most", "followed"),
    [
        ({}, 256, 320),
        ({"rank": 10}, 10, 13),
        ({"energy": 1.0}, None, None),
        ({"energy": 1.0, "rank": 8}, 8, 10),
        ({"energy": 1.0, "error_budget": 0.1}, 256, 320),
    ],
)
def test_how_many_directions_are_kept_and_followed(options, most, followed):
    truncation = Truncation(**options)
    assert (truncation.most, truncation.followed) == (most, followed)


def test_a_truncation_keeps_all_or_what_it_says():
    covariance = make_tasks(1, tasks=1)[0].covariance
    assert Truncation(energy=1.0).apply(covariance) is covariance
    for options in ({"energy": 0.9}, {"rank": 3}, {"rank": 30}):
        found = Truncation(**options).apply(covariance)
        expected = truncate(covariance, options.get("energy", 0.9999), rank=options.get("rank")).in_half_precision()
        assert torch.equal(found.factor, expected.factor)
        assert found.remainder == expected.remainder
    eight = Truncation(rank=3, dtype=torch.int8).apply(covariance)
    assert eight.factor.dtype == torch.int8
    assert len(eight.factor) == 3


def test_a_truncation_by_an_error_budget_reads_the_deltas():
    task = make_tasks(1, tasks=1)[0]
    ranks = [
        len(Truncation(error_budget=budget).apply(task.covariance, [task.delta]).factor) for budget in (0.5, 0.01)
    ]
    assert ranks[0] < ranks[1]
    assert len(Truncation(error_budget=0.01, rank=2).apply(task.covariance, [task.delta]).factor) == 2


# How many directions an error budget takes


def delta(seed, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(torch.randn(4, width, generator=generator), torch.randn(20, 4, generator=generator))


@given(seeds, st.floats(0.005, 0.1))
@settings(max_examples=25, deadline=None)
def test_the_merged_delta_stays_within_twice_the_budget(seed, budget):
    """An estimate to first order, not a bound: the other tasks are not known when the rank is chosen."""
    tasks = [(exact(inputs(seed + t)), delta(seed + t)) for t in range(3)]
    whole, cut = LeastSquaresMerge(), LeastSquaresMerge()
    for covariance, own in tasks:
        spectrum = eigen_directions(covariance)
        whole.add(covariance, {"layer": own})
        cut.add(spectrum.keep(spectrum.rank_within([own], budget)), {"layer": own})
    best, found = whole.solve()["layer"].dense(), cut.solve()["layer"].dense()
    root = torch.linalg.cholesky(sum(covariance.matrix for covariance, _ in tasks))
    assert ((found - best) @ root).norm() < 2 * budget * (best @ root).norm() + 1e-6


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_a_smaller_budget_keeps_no_fewer_directions(seed):
    spectrum = eigen_directions(exact(inputs(seed)))
    ranks = [spectrum.rank_within([delta(seed)], budget) for budget in (1.0, 0.3, 0.1, 0.03, 0.01, 1e-9)]
    assert ranks == sorted(ranks)
    assert ranks[-1] >= WIDTH - 2


def test_energy_that_no_delta_reads_need_not_be_kept():
    """A massive direction, as language models have: it holds all the energy, and none of the error."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(64, 64, generator=generator).double()).Q
    values = torch.cat([torch.tensor([1e4]), torch.logspace(0, -3, 63)]).double()
    covariance = DenseCovariance(remainder=0.0, matrix=(vectors * values) @ vectors.T)
    spectrum = eigen_directions(covariance)
    assert len(truncate(covariance, 0.999).factor) == 1  # energy sees nothing but it
    assert spectrum.rank_within([delta(0, 64)], 0.001) > 20


def test_even_inputs_need_no_direction_at_all():
    spectrum = Spectrum(torch.ones(8).double(), torch.eye(8, 32).double(), rest=24.0)
    assert spectrum.rank_within([delta(0, 32)], 0.01) == 0
    assert spectrum.rank_within([], 0.01) == 0
