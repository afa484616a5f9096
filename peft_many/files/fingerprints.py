"""Fingerprints of weights: they tell whether an adapter was trained further since it was measured or merged."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..algebra.devices import moved
from ..algebra.precision import without_autocast

LARGEST_FINGERPRINTED = 1 << 20
FINGERPRINT_LENGTH = 9
NO_FINGERPRINT = (0.0,) * FINGERPRINT_LENGTH  # in place of a `weight_fingerprint` that is not known yet


def weight_fingerprint(A: Tensor, B: Tensor) -> list[float]:
    """Nine numbers that move with any change of a LoRA's weights, and hardly with a cast to another dtype.

    The norm of `B`, and the components of `A` and `B`, each of norm one, along four fixed directions: a norm alone
    moves in second order only. A factor on `A`, such as the LoRA scaling, changes nothing.
    """
    return fingerprint_there(A, B).tolist()


def fingerprint_there(A: Tensor, B: Tensor) -> Tensor:
    """[`weight_fingerprint`] as a tensor where the weights are, so that a GPU need not be waited for.

    Of several pairs, `(…, r, in)` and `(…, out, r)`, it has the shape `(…, 9)`.
    """
    norms = torch.linalg.vector_norm(B.detach().float(), dim=(-2, -1))
    return torch.cat([norms.unsqueeze(-1), _components(A.flatten(-2)), _components(B.flatten(-2))], dim=-1)


def tensors_fingerprint(tensors: Sequence[Tensor]) -> list[float]:
    """As `weight_fingerprint`, of any tensors: the norm of all, and four components of each.

    Of large tensors, which layers share, a part has to do.
    """
    parts = [tensor.flatten()[:LARGEST_FINGERPRINTED] for tensor in tensors]
    norm = math.hypot(*(part.float().norm().item() for part in parts))
    return [norm, *(component for part in parts for component in _components(part).tolist())]


def state_fingerprint(state: Mapping[str, Tensor]) -> list[float]:
    """As `tensors_fingerprint`, of a module's state dict."""
    return tensors_fingerprint([state[key] for key in sorted(state)])


def same_weights(one: Sequence[float], two: Sequence[float]) -> bool:
    """Whether two fingerprints can be those of the same weights, up to rounding to bfloat16 and back.

    That moves the eight components by 3e-3 together, whatever the size of the layer, and hardly ever by 7.5e-3;
    training that moves one layer's `A` or `B` by 1 % moves them by 1.3e-2, about.
    """
    if not len(one) == len(two) > 0:
        return False
    return abs(one[0] - two[0]) <= 1e-3 * max(one[0], two[0]) and math.dist(one[1:], two[1:]) <= 7.5e-3


@without_autocast()
def _components(flat: Tensor) -> Tensor:
    flat = flat.detach().float()
    norms = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
    return flat @ _directions(flat.shape[-1], flat.device).mT / norms.clamp(min=1e-30)


@functools.lru_cache(maxsize=8)  # the layers of a model have few sizes
def _directions(length: int, device: torch.device) -> Tensor:
    index = torch.arange(1, length + 1, dtype=torch.float64)
    return moved(torch.stack([torch.cos(frequency * index) for frequency in (1, 2, 3, 4)]).float(), device)
