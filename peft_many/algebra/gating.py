"""Gated deltas: how much of each task's own delta, and how much of the merged one, acts on a row of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A row is given to its tasks' own deltas where one task has at least this weight, and to the merged delta elsewhere.
# A little less than one half, which two tasks that are as likely do not have where others have a trace of it.
CONFIDENT_WEIGHT = 0.49


def confidence(weights: Tensor, threshold: float = CONFIDENT_WEIGHT) -> Tensor:
    """How far the task weights of rows are to be trusted, `c`: 1 where the largest one reaches the threshold, else 0.

    From shape `(rows, tasks)`, rows that sum to one or are zero where nothing is known, to `(rows,)`, float32.
    """
    return (weights.amax(dim=-1) >= threshold).float()


def gates(weights: Tensor, trust: Tensor, merged: Tensor, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the rows of `A*` and of the tasks' own `A_t` are multiplied by, for each row of a batch.

        ΔW(x) = Σ_t B_t [ m A*_t + c 1[t = argmax α] A_t ]

    `c = 1` is the own delta of the likeliest task, of equal ones the first: halves of two tasks that contradict each
    other answer as neither. `m = 1` is the merged delta. Where both are zero, as for rows that are like no task's, the
    base model stays as it is. Of the weights `α`, shape `(rows, tasks)`, and `c` and `m`, shape `(rows,)`, these have
    shapes `(rows, 1)` and `(rows, Σ r_t)`; the rank `r_t` is zero where a task did not train the layer.
    """
    places = [t for t, rank in enumerate(ranks) for _ in range(rank)]
    return merged.to(weights)[:, None], (trust.to(weights)[:, None] * likeliest(weights))[:, places]


def likeliest(weights: Tensor) -> Tensor:
    """1 for the largest weight of each row, of equal ones the first, and 0 for the others."""
    return torch.nn.functional.one_hot(weights.argmax(dim=-1), weights.shape[-1]).to(weights)


def decided(weights: Tensor) -> Tensor:
    """Task weights of rows, `(rows, tasks)`; those that are trusted with one task are that task's alone."""
    return torch.where(confidence(weights)[:, None] > 0, likeliest(weights), weights)


def rows_of_images(tokens: Tensor, placeholders: Tensor) -> Tensor | None:
    """Which row of a batch each image stands in: images fill the rows' placeholder tokens in order.

    Of the tokens that each image becomes (at least one) and the placeholder tokens of each row, int64 on the CPU;
    shape `(images,)`, int64. `None` where the counts differ or an image would be cut in two.
    """
    if tokens.sum() != placeholders.sum():
        return None
    row_ends, ends = placeholders.cumsum(0), tokens.cumsum(0)
    first = torch.searchsorted(row_ends, ends - tokens, right=True)
    last = torch.searchsorted(row_ends, ends - 1, right=True)
    return first if torch.equal(first, last) else None
