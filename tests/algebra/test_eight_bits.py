"""Eight bits an entry: how far off at most, what one large channel costs the others, and what a merge makes of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_many.algebra.covariance import InvalidCovarianceError, LowRankCovariance
from peft_many.algebra.eight_bits import Scales, from_eight_bits, to_eight_bits
from peft_many.algebra.lpm import LeastSquaresMerge, LowRankDelta
from peft_many.algebra.sketch import CovarianceAccumulator
from tests.algebra.problems import make_tasks, seeds, truncate


@given(seeds, st.integers(0, 4), st.integers(0, 40), st.sampled_from([1e-30, 1.0, 1e30]))
def test_entries_are_off_by_half_a_step_of_their_row(seed, rows, width, size):
    generator = torch.Generator().manual_seed(seed)
    matrix = size * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    matrix *= torch.randint(0, 2, (width,), generator=generator)  # and some columns of zeros
    numbers, scales = to_eight_bits(matrix)
    assert (numbers.dtype, numbers.shape) == (torch.int8, matrix.shape)
    assert (scales.rows.shape, scales.columns.shape) == ((rows,), (width,))
    found = from_eight_bits(numbers, scales, torch.float64)
    columns = 2.0 ** scales.columns.double()
    steps = (matrix / columns).abs().amax(1, keepdim=True) / 127 * columns if width else matrix
    assert ((found - matrix).abs() <= 0.5001 * steps).all()
    torch.testing.assert_close(from_eight_bits(numbers, scales, torch.float32).double(), found, rtol=1e-6, atol=0)


def test_a_large_channel_takes_no_bits_from_others():
    matrix = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    expected = from_eight_bits(*to_eight_bits(matrix), torch.float32)
    matrix[:, 7] *= 2.0**20
    found = from_eight_bits(*to_eight_bits(matrix), torch.float32)
    found[:, 7] /= 2.0**20
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("outlier", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize(("rounding", "limit"), [("in_eight_bits", 0.015), ("in_half_precision", 1e-3)])
def test_a_merge_hardly_moves(rounding, limit, outlier):
    """On the inputs of a layer of some width whose spectrum falls; two channels may be far larger than the others."""
    generator = torch.Generator().manual_seed(0)
    exact, rounded, tasks = LeastSquaresMerge(), LeastSquaresMerge(), []
    for _ in range(3):
        turn = torch.linalg.qr(torch.randn(160, 160, generator=generator, dtype=torch.float64)).Q
        inputs = torch.randn(600, 160, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 160) @ turn
        inputs[:, [7, 100]] *= outlier
        accumulated = CovarianceAccumulator(160)
        accumulated.update(inputs)
        kept = truncate(accumulated.result(), 0.99999, rank=64)
        A, B = (torch.randn(shape, generator=generator) for shape in ((4, 160), (50, 4)))
        delta = LowRankDelta(A=A, B=B)
        exact.add(kept, {"layer": delta})
        rounded.add(getattr(kept, rounding)(), {"layer": delta})
        tasks.append((inputs, delta))
    expected, found = exact.solve()["layer"].dense(), rounded.solve()["layer"].dense()
    for inputs, delta in tasks:
        assert (inputs @ (found - expected).T).norm() < limit * (inputs @ delta.dense().T).norm()


@given(seeds)
def test_all_forms_of_one_covariance_agree(seed):
    eight = truncate(make_tasks(seed)[0].covariance, 0.9).in_eight_bits()
    eight.check()
    dense = eight.dense()
    rows = torch.randn(3, eight.width, dtype=torch.float64)
    torch.testing.assert_close(eight.product(rows), rows @ dense)
    torch.testing.assert_close(eight.moment(rows), rows @ dense @ rows.T)
    assert eight.trace == pytest.approx(dense.trace().item(), rel=1e-6)
    half = eight.in_half_precision()
    half.check()
    torch.testing.assert_close(half.dense(), dense, rtol=0, atol=2e-3 * eight.trace)


@pytest.mark.parametrize("wrong", ["no scales", "too few", "of floats", "not finite"])
def test_factors_and_scales_that_do_not_fit(wrong):
    eight = LowRankCovariance(0.1, torch.randn(2, 40)).in_eight_bits()
    factor, (rows, columns) = eight.factor, eight.scales
    factor, scales = {
        "no scales": (factor, None),
        "too few": (factor, Scales(rows, columns[:3])),
        "of floats": (factor.float(), Scales(rows, columns)),
        "not finite": (factor, Scales(rows * torch.nan, columns)),
    }[wrong]
    with pytest.raises(InvalidCovarianceError):
        LowRankCovariance(0.1, factor, 1.0, scales).check()
