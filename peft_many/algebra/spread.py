"""How images of one task differ among themselves: the metric in which an image is nearer to one task than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .covariance import Covariance, LowRankCovariance
from .precision import without_autocast
from .spectrum import eigen_directions
from .sums import mean_covariance


@dataclass(frozen=True)
class FeatureMetric:
    """Squared Mahalanobis distances of a covariance `Σ`, given by its leading eigen-directions."""

    directions: Tensor  # (k, d), orthonormal rows
    variances: Tensor  # (k + 1,), positive: along the directions, and along every other one
    share: float = 0.0  # of `Σ` that is the covariance of the samples which it is from; the rest is shrinkage

    @without_autocast()
    def squared_distances(self, features: Tensor, prototypes: Tensor) -> Tensor:
        """`(x − μ)ᵀ Σ⁻¹ (x − μ)` of each row `x` of `features`, `(m, d)`, and `μ` of `prototypes`, `(n, d)`: `(m, n)`.

        What lies along the directions and the remainder are summed up apart, so that nothing cancels; both are linear,
        and so the directions are multiplied by once, however many prototypes there are.
        """
        V, variances = self.directions.to(features), self.variances.to(features)
        prototypes = prototypes.to(features)
        centre = prototypes.mean(0)  # far from zero, and common to all
        rest, rests = features - centre, prototypes - centre
        along, alongs = rest @ V.T, rests @ V.T
        rest, rests = rest - along @ V, rests - alongs @ V
        found = []
        for a, r in zip(alongs, rests):
            inside = ((along - a).square() / variances[:-1]).sum(-1)
            found.append(inside + (rest - r).square().sum(-1) / variances[-1])
        return torch.stack(found, dim=-1)

    def whitened(self, rows: Tensor) -> Tensor:
        """`Σ^(−1/2) x` of each row, `(m, d)`: between these, plain distances are those of the metric."""
        return self._scaled(rows, self.variances.to(rows).rsqrt())

    def mean_distance(self, covariance: Covariance) -> float:
        """`tr(Σ⁻¹ C)`: the mean squared distance of features with the covariance `C` from their own mean."""
        rows = covariance.factor_rows().double()
        along = self.squared_distances(rows, rows.new_zeros(1, covariance.width)).sum().item()
        inverses = 1 / self.variances.double()
        others = covariance.width - len(self.directions)
        return along + covariance.remainder * (inverses[:-1].sum() + others * inverses[-1]).item()

    def draws(self, count: int, generator: torch.Generator) -> Tensor:
        """Gaussian vectors of mean zero and covariance `Σ`, shape `(count, d)`, float64, drawn on the CPU."""
        drawn = torch.randn(count, self.directions.shape[1], dtype=torch.float64, generator=generator)
        return self._scaled(drawn, self.variances.double().sqrt())

    def _scaled(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Rows with what lies along each direction, and along every other one, times its scale, `(k + 1,)`."""
        V = self.directions.to(rows)
        along = rows @ V.T
        return scales[-1] * rows + (along * (scales[:-1] - scales[-1])) @ V


def gaussian(mean: Tensor, covariance: Covariance, count: int, generator: torch.Generator) -> Tensor:
    """Vectors with this mean and covariance, shape `(count, d)`, float32, drawn on the CPU."""
    rows = covariance.factor_rows("cpu").float()
    along = torch.randn(count, len(rows), generator=generator) @ rows
    if covariance.remainder:
        along += covariance.remainder**0.5 * torch.randn(along.shape, generator=generator)
    return mean.cpu().float() + along


def centred(rows: Tensor) -> LowRankCovariance:
    """The covariance of some rows about their own mean, shape `(n, d)` with `n ≥ 2`; exact, float64."""
    rows = rows.double()
    factor = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
    return LowRankCovariance(remainder=0.0, factor=factor)


def shared_metric(
    spreads: Sequence[Covariance], images: Sequence[int], rank: int = 256, least: float = 0.0
) -> FeatureMetric:
    """The metric of the tasks' common covariance about their own means, shrunk for the number of images it is from.

    Shrinkage towards a multiple of the identity is the oracle approximating one (OAS; Chen, Wiesel, Eldar, Hero 2010,
    arXiv 0907.4698, equation 23), which knows only the covariance and the number of samples. In float64. Beyond `rank`
    directions, all share their mean variance. `least` is added to all of them.
    """
    spectrum = eigen_directions(mean_covariance(spreads, images)).leading(rank)
    values, width = spectrum.values, spectrum.directions.shape[1]
    level = spectrum.remainder(len(values))
    squared = values.square().sum().item() + (width - len(values)) * level**2
    trace, mean = spectrum.trace, spectrum.trace / width
    if mean == 0.0:  # every image of a task has the same features
        return FeatureMetric(spectrum.directions[:0], torch.full((1,), least or 1.0, dtype=torch.float64))
    gap = squared - trace * mean
    share = ((1 - 2 / width) * squared + trace**2) / ((sum(images) + 1 - 2 / width) * gap) if gap > 0 else 1.0
    share = min(1.0, share)
    variances = torch.cat([values, values.new_tensor([level])])
    return FeatureMetric(spectrum.directions, (1 - share) * variances + share * mean + least, 1 - share)


# Of a sample's leverage, whose expectation can come out above one where covariances were truncated.
_MOST_LEVERAGE = 0.9


def new_distances(metric: FeatureMetric, spreads: Sequence[Covariance], samples: Sequence[int]) -> list[float]:
    """The squared distance of each task's new inputs from its prototype, on average; at least that of all together.

    That of the measured ones, `d = tr(Σ⁻¹ C_t)`, is smaller: prototype and metric are from these. By leaving one out
    of `n_t`, with the leverage `h = s n_t d / ((n_t − 1) N)` of a sample in the share `s` of `Σ` that is from all `N`:

        d (1 + 1 / n_t) / (1 − h)^(3/2)

    Without shrinkage, and of one Gaussian, `1 / (1 − h)` is what makes of `χ²` the mean of the scaled `F` distribution
    that new distances have; `(1 − h)^(−1/2)` makes up for its spread, which grows by this beside the mean. Tasks count
    by themselves, as some have inputs of any kind, and by their mean, as few samples hardly tell.
    """
    total = max(1, sum(samples))

    def new(seen: float, count: float) -> float:
        leverage = metric.share * count * seen / (max(1.0, count - 1) * total)
        return seen * (1 + 1 / max(1.0, count)) / (1 - min(leverage, _MOST_LEVERAGE)) ** 1.5

    all_together = metric.mean_distance(mean_covariance(spreads, samples))
    least = max(1.0, new(all_together, total / max(1, len(samples))))
    return [max(least, new(metric.mean_distance(one), count)) for one, count in zip(spreads, samples, strict=True)]
