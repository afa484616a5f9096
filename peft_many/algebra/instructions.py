"""What an instruction is like: the mean of its tokens' embeddings, and the same with later tokens counting more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .precision import without_autocast

# Tokens that are embedded in one step, 100 MB in bfloat16 and float32 if they are 4096 wide.
_AT_ONCE = 1 << 12


def token_weights(kept: Tensor) -> Tensor:
    """What an instruction's `n` tokens count for its features, `1 / n` and `p_i / n`.

    Their places `p_i` go evenly from 0 to 1, so that the same words in another order are another instruction. From
    `kept`, `(rows, length)`, which tells an instruction's tokens from images, padding and answers, to
    `(rows, 2, length)`, float32; zero where nothing is kept.
    """
    counted = kept.float()
    count = counted.sum(1, keepdim=True)
    places = (counted.cumsum(1) - 1) / (count - 1).clamp(min=1)
    return torch.stack([counted, counted * places], dim=1) / count.clamp(min=1)[:, None]


@without_autocast()
def instruction_features(embedded: Tensor, weights: Tensor) -> Tensor:
    """`[Σ e_i / n, Σ p_i e_i / n]`, or some tokens' part of it, of embeddings `e_i` scaled to length one.

    From shape `(rows, length, d)` and the [`token_weights`] to `(rows, 2 d)`, float32; zero for rows without a token.
    """
    tokens = embedded.float()
    return torch.bmm(weights / tokens.norm(dim=-1).clamp(min=1e-12)[:, None], tokens).flatten(1)


def features_of_tokens(embed: Callable[[Tensor], Tensor], ids: Tensor, kept: Tensor) -> Tensor:
    """`instruction_features` of token ids, `(rows, length)`, which are embedded a part at a time."""
    length = max(1, _AT_ONCE // len(ids))
    parts = zip(ids.split(length, dim=1), token_weights(kept).split(length, dim=2))
    return torch.stack([instruction_features(embed(some), weights) for some, weights in parts]).sum(0)
