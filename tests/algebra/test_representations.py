"""Every way in which a covariance is held has the properties of all (`tests/algebra/properties.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_many.algebra.covariance import Covariance, DenseCovariance, LowRankCovariance
from peft_many.algebra.sketch import CovarianceAccumulator, CovarianceSketch
from peft_many.algebra.sums import CovarianceSum
from tests.algebra.problems import truncate
from tests.algebra.properties import MergingProperties


def accumulated(inputs: Tensor) -> DenseCovariance:
    accumulator = CovarianceAccumulator(inputs.shape[1])
    for batch in inputs.split(7):
        accumulator.update(batch)
    return accumulator.result()


class TestDense(MergingProperties):
    """As it is accumulated."""

    def statistic(self, inputs: Tensor) -> Covariance:
        return accumulated(inputs)


class TestDenseInFloat32(MergingProperties):
    def statistic(self, inputs: Tensor) -> Covariance:
        exact = accumulated(inputs)
        return DenseCovariance(exact.remainder, exact.matrix.float())


class TestDenseAndRemainder(MergingProperties):
    """A share of the energy held as an even remainder, such as a ridge."""

    def statistic(self, inputs: Tensor) -> Covariance:
        exact = accumulated(inputs)
        return DenseCovariance(0.01 * exact.trace / exact.width, 0.99 * exact.matrix)


class TestLowRank(MergingProperties):
    """All directions that the tokens span, and no remainder."""

    def statistic(self, inputs: Tensor) -> Covariance:
        return LowRankCovariance(0.0, inputs / len(inputs) ** 0.5)


class TestLowRankAndRemainder(MergingProperties):
    """What adapters keep by default, MAny*: the leading directions, and what was discarded spread evenly."""

    def statistic(self, inputs: Tensor) -> Covariance:
        return truncate(accumulated(inputs), 0.999)


class TestHalfPrecision(MergingProperties):
    """As it is stored."""

    def statistic(self, inputs: Tensor) -> Covariance:
        return truncate(accumulated(inputs), 0.999).in_half_precision()


class TestSketch(MergingProperties):
    """Of more tokens than it follows directions, which the others' batches hardly are."""

    def statistic(self, inputs: Tensor) -> Covariance:
        sketch = CovarianceSketch(inputs.shape[1], 6)
        for batch in inputs.split(5):
            sketch.update(batch)
        return sketch.result()


class TestSum(MergingProperties):
    """What hangs on a merge's layers: parts in several representations."""

    def statistic(self, inputs: Tensor) -> Covariance:
        half = len(inputs) // 2
        first, second = accumulated(inputs[:half]), accumulated(inputs[half:])
        share = half / len(inputs)
        parts = ((share, truncate(first, 0.999, torch.float64)), (1 - share, second))
        return CovarianceSum(remainder=0.0, parts=parts)
