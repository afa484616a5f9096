"""What compares features of images, or of instructions, with the tasks' prototypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.spread import FeatureMetric


class TaskRouter(nn.Module):
    """The tasks' prototypes, and with a Gaussian router its metric: buffers that stay float32 whatever dtype a model
    is cast to, since rounded ones would route differently.

    Args:
        tasks (`int`): How many there are.
        width (`int`): Features of a prototype.
        directions (`int`, *optional*): How many directions the metric has.
        device (`torch.device`): Where the buffers are.
    """

    prototypes: Tensor
    directions: Tensor
    variances: Tensor

    def __init__(self, tasks: int, width: int, directions: int | None, device: torch.device) -> None:
        super().__init__()
        like = torch.ones(0, dtype=torch.float32, device=device)
        self.register_buffer("prototypes", like.new_zeros(tasks, width))
        self.is_gaussian = directions is not None
        if directions is not None:
            self.register_buffer("directions", like.new_zeros(directions, width))
            self.register_buffer("variances", like.new_ones(directions + 1))

    @property
    def metric(self) -> FeatureMetric | None:
        """The metric of a Gaussian router."""
        return FeatureMetric(self.directions, self.variances) if self.is_gaussian else None

    def _apply(self, fn: Any, recurse: bool = True) -> TaskRouter:
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, after in self.named_buffers(recurse=False):
            # Of `to_empty` there is nothing to keep.
            self._buffers[name] = after.float() if before[name].is_meta else before[name].to(after.device)
        return self
