"""Ranks from an error budget on the merged delta."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_many.algebra.budget import rank_within
from peft_many.algebra.covariance import DenseCovariance
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta
from peft_many.algebra.spectrum import Spectrum, eigen_directions
from tests.algebra.problems import seeds
from tests.algebra.test_sketch import WIDTH, exact, inputs


def delta(seed, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(torch.randn(4, width, generator=generator), torch.randn(20, 4, generator=generator))


@given(seeds, st.floats(0.005, 0.3))
@settings(max_examples=25, deadline=None)
def test_the_merged_delta_stays_within_twice_the_budget(seed, budget):
    """An estimate, not a bound: the other tasks are not known when the rank is chosen."""
    tasks = [(exact(inputs(seed + t)), delta(seed + t)) for t in range(3)]
    whole, cut = LeastSquaresMerge(), LeastSquaresMerge()
    for covariance, own in tasks:
        spectrum = eigen_directions(covariance)
        whole.add(covariance, {"layer": own})
        cut.add(spectrum.keep(rank_within(spectrum, [own], budget)), {"layer": own})
    best, found = whole.solve()["layer"].dense(), cut.solve()["layer"].dense()
    root = torch.linalg.cholesky(sum(covariance.matrix for covariance, _ in tasks))
    assert ((found - best) @ root).norm() < 2 * budget * (best @ root).norm() + 1e-6


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_a_smaller_budget_keeps_no_fewer_directions(seed):
    spectrum = eigen_directions(exact(inputs(seed)))
    ranks = [rank_within(spectrum, [delta(seed)], budget) for budget in (1.0, 0.3, 0.1, 0.03, 0.01, 1e-9)]
    assert ranks == sorted(ranks)
    assert ranks[-1] >= WIDTH - 2


def test_energy_that_no_delta_reads_need_not_be_kept():
    """A massive direction, as language models have: it holds all the energy, and none of the error."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(64, 64, generator=generator).double()).Q
    values = torch.cat([torch.tensor([1e4]), torch.logspace(0, -3, 63)]).double()
    covariance = DenseCovariance(remainder=0.0, tokens=9, matrix=(vectors * values) @ vectors.T)
    spectrum = eigen_directions(covariance)
    assert len(spectrum.truncate(0.999).factor) == 1  # energy sees nothing but it
    assert rank_within(spectrum, [delta(0, 64)], 0.001) > 20


def test_even_inputs_need_no_direction_at_all():
    spectrum = Spectrum(torch.ones(8).double(), torch.eye(8, 32).double(), rest=24.0, tokens=1)
    assert rank_within(spectrum, [delta(0, 32)], 0.01) == 0
    assert rank_within(spectrum, [], 0.01) == 0


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_the_budget_is_positive(budget):
    with pytest.raises(ValueError, match="error_budget"):
        rank_within(eigen_directions(exact(inputs(0))), [], budget)
