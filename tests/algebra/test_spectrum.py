"""Truncation keeps the trace, and no more directions than it must."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_many.algebra.covariance import CovarianceAccumulator
from peft_many.algebra.spectrum import truncate
from tests.algebra.problems import make_tasks, relative_error, seeds


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


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.1])
def test_energy_must_be_a_share(energy):
    with pytest.raises(ValueError, match="energy"):
        truncate(make_tasks(1, tasks=1)[0].covariance, energy)


def test_nothing_seen_stays_a_covariance():
    truncate(CovarianceAccumulator(3).result(), 0.9).check()
