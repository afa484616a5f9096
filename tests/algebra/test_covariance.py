"""Covariances: accumulation in float64, and what is no covariance."""

import math

import pytest
import torch

from peft_many.algebra.covariance import DenseCovariance, InvalidCovarianceError, LowRankCovariance
from peft_many.algebra.sketch import CovarianceAccumulator
from peft_many.algebra.sums import CovarianceSum
from tests.algebra.problems import relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulation_is_float64_over_any_batching(dtype):
    inputs = torch.randn(50, 8).to(dtype)
    accumulator = CovarianceAccumulator(8)
    for batch in inputs.split([1, 20, 0, 29]):
        accumulator.update(batch)
    result = accumulator.result()
    assert accumulator.tokens == 50
    assert result.matrix.dtype == torch.float64
    assert torch.equal(result.matrix, result.matrix.T)
    assert relative_error(result.matrix, inputs.double().T @ inputs.double() / 50) < 1e-14


def test_directions_that_no_token_reached_hold_no_rounding_noise_that_matters():
    """The reason for float64: float32 noise in the null space would be far above the ridge."""
    inputs = torch.randn(30, 64, dtype=torch.float64)
    inputs[:, 0] *= 1e3
    accumulator = CovarianceAccumulator(64)
    accumulator.update(inputs)
    mean_energy = accumulator.result().trace / 64
    assert torch.linalg.eigvalsh(accumulator.result().matrix)[:34].abs().max() < 1e-9 * mean_energy


def test_nothing_seen_is_a_zero_covariance():
    result = CovarianceAccumulator(3).result()
    assert torch.equal(result.matrix, torch.zeros(3, 3, dtype=torch.float64))


BAD = {
    "NaN or Inf": DenseCovariance(remainder=0.0, matrix=torch.tensor([[1.0, 0.0], [0.0, math.nan]])),
    "not symmetric": DenseCovariance(remainder=0.0, matrix=torch.tensor([[1.0, 0.5], [0.1, 1.0]])),
    "negative in some direction": DenseCovariance(remainder=0.0, matrix=torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
    "shape": DenseCovariance(remainder=0.0, matrix=torch.zeros(2, 3)),
    "remainder is -1.0": LowRankCovariance(remainder=-1.0, factor=torch.ones(1, 2)),
    "remainder is nan": LowRankCovariance(remainder=math.nan, factor=torch.ones(1, 2)),
    "holds NaN or Inf": LowRankCovariance(remainder=0.0, factor=torch.tensor([[math.inf, 0.0]])),
    "it holds NaN or Inf": LowRankCovariance(remainder=0.0, factor=torch.ones(1, 2), scale=1e308),
    "factor has shape": LowRankCovariance(remainder=0.0, factor=torch.ones(2)),
}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_no_covariance_is_refused(reason):
    with pytest.raises(InvalidCovarianceError, match=reason):
        BAD[reason].check()
    with pytest.raises(InvalidCovarianceError):
        CovarianceSum(remainder=0.0, parts=((1.0, BAD[reason]),)).check()
