"""What an instruction is like: the mean of its tokens' embeddings, and the same with later tokens counting more."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import without_autocast


@without_autocast()
def instruction_features(embedded: Tensor, kept: Tensor) -> Tensor:
    """Of a base model's token embeddings `e_i`, scaled to length one, `[Σ e_i / n, Σ p_i e_i / n]`.

    The places `p_i` of an instruction's `n` tokens go evenly from 0 to 1, so that the same words in another order are
    another instruction. From shape `(rows, length, d)`, and `kept`, `(rows, length)`, which tells the instruction's
    tokens from images, padding and answers, to `(rows, 2 d)`, float32; zero for rows without a token.
    """
    counted = kept.float()
    count = counted.sum(1, keepdim=True)
    places = (counted.cumsum(1) - 1) / (count - 1).clamp(min=1)
    weights = torch.stack([counted, counted * places], dim=1) / count.clamp(min=1)[:, None]
    tokens = torch.nn.functional.normalize(embedded.float(), dim=-1)
    return torch.bmm(weights, tokens.masked_fill(~kept[:, :, None], 0)).flatten(1)
