"""The routed projector in vLLM: its own projector, with a copy of it for each task inside."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.routing import pool_segments, task_weights, tasks_that_take
from ..algebra.spread import FeatureMetric
from ..records import MergeOptions, RoutedProjector


@dataclass
class Images:
    """How the images of a batch lie in the rows of features, and what was decided about them.

    Args:
        shares (`Tensor`): What each has of the rows, `(images,)`, in lowest terms.
        decided (`list`):
            Projectors in the order in which they ran, their tasks' weights, `(images, tasks)`, and which tasks take
            each image, `None` if any may.
    """

    shares: Tensor
    decided: list[tuple[ServedProjector, Tensor, Tensor | None]] = field(default_factory=list)


_images: ContextVar[Images | None] = ContextVar("images", default=None)


@contextlib.contextmanager
def images_lie(shares: Tensor) -> Iterator[Images]:
    """Tell the projectors that run meanwhile what each image has of their rows, `(images,)`, up to a factor."""
    shares = shares.cpu().long()
    images = Images(shares // max(1, math.gcd(*shares.tolist())))
    token = _images.set(images)
    try:
        yield images
    finally:
        _images.reset(token)


class ServedProjector(nn.Module):
    """What stands before a projector's own class, which stays as it is until [`route`] is called.

    The tensors of the base model's projector keep their names, so that they are loaded as ever. Each expert is the
    projector's own class once more, sharded and quantised as the server does it.
    """

    prototypes: Tensor
    directions: Tensor
    variances: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._another = functools.partial(type(self).__mro__[2], *args, **kwargs)
        self._options: MergeOptions | None = None

    def route(self, routed: RoutedProjector, options: MergeOptions) -> None:
        """Make room for experts and prototypes, to be loaded into. The latter stay float32: they decide."""
        self._options, self.routed = options, routed
        self._is_gaussian = routed.directions is not None
        self._trained = [task.trained for task in routed.tasks]
        self.experts = nn.ModuleDict(
            {f"task_{t}": self._another() for t, trained in enumerate(self._trained) if trained}
        )
        for name, shape in routed.shapes.items():
            # Parameters, which servers load; buffers they leave alone.
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32), requires_grad=False))

    def forward(self, features: Tensor, *of_images: Any) -> Tensor:
        """Of vision features, `(rows, …, d)`, and in some families one more argument with something for each image."""
        if self._options is None:
            return super().forward(features, *of_images)
        images_here = _images.get()
        total = 0 if images_here is None else int(images_here.shares.sum())
        if images_here is None or total == 0 or len(features) % total:
            told = "nothing is known" if images_here is None else f"they should lie as {images_here.shares.tolist()}"
            raise RuntimeError(f"The images in {len(features)} rows of features cannot be told apart: {told}.")
        lengths = images_here.shares * (len(features) // total)
        task_weights, fits = self._decide(features, lengths)
        images_here.decided.append((self, task_weights, fits))
        by_expert = self._by_expert(task_weights)
        busy = (by_expert != 0).any(dim=0).nonzero()[:, 0].tolist()  # NaN counts: broken features stay broken
        if len(busy) == 1:
            return self._run(busy[0], features, of_images)
        mixed: Tensor | None = None
        for e in busy:
            weights = by_expert[:, e]
            images = weights != 0
            own = images.repeat_interleave(lengths).nonzero()[:, 0].to(features.device)
            output = self._run(
                e, features[own], [[one for one, is_in in zip(of, images) if is_in] for of in of_images]
            )
            made = lengths * len(output) // len(own)  # such as one row for four
            if mixed is None:
                mixed = output.new_zeros(int(made.sum()), *output.shape[1:], dtype=torch.float32)
            places = images.repeat_interleave(made).nonzero()[:, 0].to(output.device)
            of_rows = weights.repeat_interleave(made).to(output.device)[places]
            mixed.index_add_(0, places, of_rows.reshape(-1, *[1] * (output.dim() - 1)) * output.float())
        assert mixed is not None
        return mixed.to(features.dtype)

    def _decide(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tasks' weights, `(images, tasks)`, on the host, which has to know experts, and who takes each image."""
        options = self._options
        assert options is not None
        assert options.temperature is not None
        rows = features.flatten(0, -2)
        pooled = pool_segments(rows, (lengths * (len(rows) // len(features))).to(rows.device))
        metric = FeatureMetric(self.directions, self.variances) if self._is_gaussian else None
        limits = self.routed.limits(options.abstain_above)
        found = task_weights(pooled, self.prototypes, metric, options.temperature, options.top_k, limits)
        return found.cpu(), tasks_that_take(pooled, self.prototypes, metric, limits)

    def _by_expert(self, weights: Tensor) -> Tensor:
        """`(images, 1 + tasks)`: what the base model's projector counts for each image, and then each task's own.

        The base model's serves tasks without one, and images that are like no task's.
        """
        trained = torch.tensor(self._trained)
        base = weights[:, ~trained].sum(dim=-1).masked_fill((weights == 0).all(dim=-1), 1.0)
        return torch.cat([base[:, None], weights.masked_fill(~trained, 0.0)], dim=-1)

    def _run(self, expert: int, features: Tensor, of_images: Sequence[Any]) -> Tensor:
        if expert == 0:
            return super().forward(features, *of_images)
        return self.experts[f"task_{expert - 1}"](features, *of_images)


def served(projector: type[Any]) -> type[Any]:
    """A projector's class with [`ServedProjector`] before it."""
    return type(f"Served{projector.__name__}", (ServedProjector, projector), {})
