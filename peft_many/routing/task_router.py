"""What compares features of images, or of instructions, with the tasks' prototypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.routing import among_all, gaussian_scores
from ..algebra.spread import FeatureMetric
from ..records import MergeRecord, RouterRecord


class TaskRouter(nn.Module):
    """The tasks' prototypes, and with a Gaussian router its metric: buffers that stay float32 whatever dtype a model
    is cast to, since rounded ones would route differently.

    Args:
        routed ([`RouterRecord`]): How many tasks there are, and what is known of the metric.
        device (`torch.device`): Where the buffers are.
    """

    prototypes: Tensor
    directions: Tensor
    variances: Tensor

    def __init__(self, routed: RouterRecord, device: torch.device) -> None:
        super().__init__()
        self.is_gaussian = routed.directions is not None
        for name, shape in routed.shapes.items():
            until_loaded = torch.ones if name == "variances" else torch.zeros
            self.register_buffer(name, until_loaded(shape, dtype=torch.float32, device=device))

    @property
    def metric(self) -> FeatureMetric | None:
        """The metric of a Gaussian router."""
        return FeatureMetric(self.directions, self.variances) if self.is_gaussian else None

    def _apply(self, fn: Any, recurse: bool = True) -> TaskRouter:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, after in dict(self.named_buffers(recurse=False)).items():
            # Of `to_empty` there is nothing to keep.
            setattr(self, name, after.float() if before[name].is_meta else before[name].to(after.device))
        return self


class InstructionRouter(TaskRouter):
    """Compares instructions with the tasks' by a Mahalanobis distance, for a merge whose gates go by instructions."""

    def __init__(self, merge: MergeRecord, device: torch.device) -> None:
        routed = merge.instructions
        assert routed is not None
        super().__init__(routed, device)
        self.tasks = len(merge.tasks)
        self.columns = [merge.names.index(name) for name in routed.tasks]
        self.limits = routed.limits(merge.options.abstain_above)
        self.uses_images = merge.options.gates_by_images

    def scores(self, features: Tensor) -> Tensor:
        """How well each task explains a row's instruction, log-likelihoods up to a constant of the row.

        From `instruction_features`, `(rows, 2 d)`, to `(rows, tasks)`, float32, on the CPU, which decides by them;
        `-inf` for tasks that are not compared with, or that a row is not like.
        """
        metric = self.metric
        assert metric is not None
        found = gaussian_scores(features, self.prototypes.to(features.device), metric, 1.0, self.limits).cpu()
        return among_all(found, self.columns, self.tasks, missing=-torch.inf)
