"""CPM, cross-modal projection merging: which task an image resembles, and how the projectors' outputs are mixed."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_segments(rows: Tensor, lengths: Tensor) -> Tensor:
    """Mean of consecutive segments of rows, one for each image.

    Args:
        rows (`torch.Tensor`): Shape `(Σ lengths, d)`.
        lengths (`torch.Tensor`): Shape `(images,)`, int64, the rows of each image.

    Returns:
        `torch.Tensor`: Shape `(images, d)`, float32.
    """
    images = torch.repeat_interleave(torch.arange(len(lengths), device=rows.device), lengths)
    sums = torch.zeros(len(lengths), rows.shape[1], device=rows.device).index_add_(0, images, rows.float())
    return sums / lengths[:, None].clamp(min=1)


def routing_weights(features: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Softmax of the cosine similarities between centred features and centred prototypes.

    Both are centred on the mean of the prototypes: frozen vision features share a large common part, which would make
    every similarity nearly one.

    Args:
        features (`torch.Tensor`): Pooled frozen features of each image, shape `(images, d)`.
        prototypes (`torch.Tensor`): One visual prototype for each task, shape `(tasks, d)`.
        temperature (`float`): `τ > 0`; smaller routes harder.

    Returns:
        `torch.Tensor`: Shape `(images, tasks)`, float32, rows sum to one.
    """
    centre = prototypes.float().mean(dim=0)
    similarity = torch.nn.functional.cosine_similarity(
        (features.float() - centre)[:, None, :], (prototypes.float() - centre)[None, :, :], dim=-1
    )
    return torch.softmax(similarity / temperature, dim=-1)
