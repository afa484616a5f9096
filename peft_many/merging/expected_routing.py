"""Where a merge's routers and gates are expected to send the inputs of each task, before any model is run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..algebra.gating import confidence, decided, gates
from ..algebra.precision import without_autocast
from ..algebra.routing import gaussian_scores, joint_weights, task_weights
from ..algebra.spread import FeatureMetric
from ..files.statistics import TaskStatistics
from ..files.stored_features import FeatureStatistics
from ..records import GATES, ExpectedRouting, MergeOptions, RoutedProjector
from ..records.base import Number
from ..records.options import IMAGES, INSTRUCTIONS
from ..routing.row_weights import RowWeights
from .routed_instructions import instruction_metric
from .routed_projectors import feature_metric, own_distances

_DRAWN = 512  # inputs of each task
_PARTS = 8  # of these, each with other errors of the prototypes


class DrawnInputs:
    """Images and instructions drawn from what was measured of each task, and what routers and gates make of them.

    They are Gaussian and independent of one another, and go through the functions that a model in use goes through.

    Args:
        options ([`MergeOptions`]): Of the merge, with nothing left open.
        routing (`Mapping[str, RoutedProjector]`): The routed projectors.
        tasks (`Mapping[str, TaskStatistics]`): By name, the tasks whose weight is not zero.
    """

    def __init__(
        self, options: MergeOptions, routing: Mapping[str, RoutedProjector], tasks: Mapping[str, TaskStatistics]
    ) -> None:
        self.options = options
        self.routing = routing
        self.tasks = tasks

    @functools.cached_property
    def expected(self) -> dict[str, ExpectedRouting]:
        """By routed projector, and for the gates if there are any, where inputs go."""
        found = {projector: self.projector(projector) for projector in self.routing}
        if self.options.gate_lora and self.options.gate_by:
            found[GATES] = self.gates(self.options.gate_by)
        return found

    def projector(self, projector: str) -> ExpectedRouting:
        """Where a routed projector would send images, by what `route_by` says."""
        by, names, images = self.options.route_by or IMAGES, self.routing[projector].names, self._images[projector]
        weights = [weight for weight, _ in images]
        if by != IMAGES:
            places = [list(self.tasks).index(name) for name in names]
            scores = [self._scores[place][:, places] for place in places]
            believed = [(None, None)] * len(images) if by == INSTRUCTIONS else images
            weights = [decided(joint_weights(asked, *shown)) for asked, shown in zip(scores, believed)]
        return _expected(by, names, weights, like_none=[1 - weight.sum(1) for weight in weights])

    @property
    def have_instructions(self) -> bool:
        """Whether gates could go by instructions."""
        asked = [task.instructions for task in self.tasks.values()]
        return all(one is not None and one.spread is not None for one in asked)

    def gates(self, by: str) -> ExpectedRouting:
        """Where gates would send inputs that go by `"images"`, `"instructions"` or `"both"`."""
        names = list(self.tasks)
        # Of several projectors, gates go by the one that is nearest to the language model, which none comes after.
        projector = next(reversed(list(self.routing)), None) if by != INSTRUCTIONS else None
        scores: Sequence[Tensor | None] = self._scores if by != IMAGES else [None] * len(names)
        shares, undecided, like_none = [], [], []
        for name, score in zip(names, scores):
            sums, fits, images = torch.zeros(_DRAWN, len(names)), None, torch.zeros(_DRAWN)
            if projector is not None and name in self.routing[projector].names:
                routed, task = self.routing[projector].names, self.tasks[name]
                # As many rows as there were in the data have images.
                shown = min(1.0, task.projectors[projector].count / max(1, task.samples))
                images[: round(shown * _DRAWN)] = 1.0
                weights, taken = self._images[projector][routed.index(name)]
                columns = [names.index(other) for other in routed]
                sums[:, columns] = weights * images[:, None]
                if taken is not None:
                    fits = torch.zeros_like(sums, dtype=torch.bool)
                    fits[:, columns] = taken
            row = RowWeights(sums, images, 0, score, fits=fits)
            own = gates(row.weights, confidence(row.weights), row.merged, [1] * len(names))[1]
            # Rows that get the merged LoRA count by their weights, which tell what they are undecided between.
            shares.append(own + row.merged[:, None] * row.weights)
            undecided.append(row.merged)
            like_none.append(1 - own.sum(1) - row.merged)
        return _expected(by, names, shares, undecided, like_none)

    @functools.cached_property
    def _images(self) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
        """By projector and task, the routing weights of drawn images, `(images, routed tasks)`, and which tasks take
        each of them, bool, or `None` if any may."""
        options = self.options
        found: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        for projector, routed in self.routing.items():
            seen = [self.tasks[name].projectors[projector] for name in routed.names]
            metric = feature_metric(seen) if options.router == "gaussian" else None
            limits, temperature = routed.limits(options.abstain_above), float(options.temperature or 0)
            weigh = functools.partial(
                task_weights, metric=metric, temperature=temperature, top_k=options.top_k, limits=limits
            )
            taken: Sequence[Tensor | None] = [None] * len(seen)
            if metric is not None and limits is not None:
                score = functools.partial(gaussian_scores, metric=metric, temperature=1.0, limits=limits)
                taken = [scores.isfinite() for scores in _of_draws(seen, metric, score)]  # the same draws
            found[projector] = list(zip(_of_draws(seen, metric, weigh), taken))
        return found

    @functools.cached_property
    def _scores(self) -> list[Tensor]:
        """By task, the scores of drawn instructions, `(instructions, tasks)`."""
        asked = [task.instructions for task in self.tasks.values() if task.instructions is not None]
        metric, above = instruction_metric(asked), self.options.abstain_above
        limits = None if above is None else [above * distance for distance in own_distances(asked, metric)]
        score = functools.partial(gaussian_scores, metric=metric, temperature=1.0, limits=limits)
        return _of_draws(asked, metric, score)


def _expected(
    by: str,
    names: Sequence[str],
    weights: Sequence[Tensor],
    undecided: Sequence[Tensor] = (),
    like_none: Sequence[Tensor] = (),
) -> ExpectedRouting:
    def means(parts: Sequence[Tensor]) -> dict[str, Number]:
        found = {name: part.double().mean().item() for name, part in zip(names, parts)}
        return {name: share for name, share in found.items() if share > 1e-6}

    shares: dict[str, dict[str, Number]] = {
        name: dict(zip(names, weight.double().mean(0).tolist())) for name, weight in zip(names, weights)
    }
    return ExpectedRouting(by, shares, means(undecided), means(like_none))


@without_autocast()
def _of_draws(
    seen: Sequence[FeatureStatistics], metric: FeatureMetric | None, weigh: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """What a router, `weigh(features, prototypes)`, makes of features that are drawn as each task's were measured.

    The mean of a few samples is nearer to them than to others of the task, and as far from the other tasks' means as
    these samples happen to be: drawn about it, two tasks that are the same would seem to be told apart. Their
    covariance is off alike. So draws have the covariance shrunk as a metric's is; and each task's own prototype is
    moved at random by `√2` of its standard error `e`, which moves its draws away from it as far, on average, as other
    inputs are further away, and as these are nearer to the other tasks. `e` is bounded by `‖μ_s − μ_t‖² ≥ ‖e_s‖² +
    ‖e_t‖²`, since distances of prototypes hold their errors.
    """
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.stack([one.prototype.float() for one in seen])
    own = [_metric_of(one) for one in seen]
    nothing = torch.zeros(1, prototypes.shape[1])

    def draws(t: int, count: int) -> Tensor:
        one = own[t]
        return nothing.expand(count, -1) if one is None else one.draws(count, generator).float()

    errors = [draws(t, _PARTS) / math.sqrt(one.count) for t, one in enumerate(seen)]
    lengths = torch.stack([_squared_distances(metric, error, nothing).mean() for error in errors])
    apart = _squared_distances(metric, prototypes, prototypes).fill_diagonal_(math.inf)
    bounds = (apart / (lengths[:, None] + lengths).clamp(min=1e-30)).amin(1).clamp(max=1.0)
    found = []
    for t, error in enumerate(errors):
        parts = []
        for e in error:
            moved = prototypes.clone()
            moved[t] += (2 * bounds[t]).sqrt() * e
            parts.append(weigh(prototypes[t] + draws(t, _DRAWN // _PARTS), moved))
        found.append(torch.cat(parts))
    return found


def _metric_of(one: FeatureStatistics) -> FeatureMetric | None:
    """How a task's own inputs differ; `None` if they do not, as far as is known."""
    if one.spread is None or one.spread.trace <= 0:
        return None
    return feature_metric([one])


def _squared_distances(metric: FeatureMetric | None, features: Tensor, prototypes: Tensor) -> Tensor:
    if metric is not None:
        return metric.squared_distances(features, prototypes)
    return torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist").square()
