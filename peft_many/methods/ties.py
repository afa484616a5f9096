"""TIES on the deltas: trim, elect signs, merge what agrees. PEFT's own implementation."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.lpm import LowRankDelta
from .base import LayerTask, MergeMethod, check_finite, check_share, trained

SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True)
class Ties(MergeMethod):
    """TIES: each `ΔW_t` keeps its largest entries, each entry the tasks that agree on its sign, and their mean.

    The entries of `ΔW_t` are compared, so the dense matrices are needed, and the result is a dense one. float32.
    PEFT's [`~peft.utils.merge_utils.ties`] does it, layer by layer (the paper's code trims over the whole model); its
    weights multiply the deltas after the signs are elected.

    Args:
        density (`float`, defaults to `0.2`): The share of entries to keep.
        scaling (`float`, defaults to `1.0`): `λ`, a factor on the result.
        majority_sign_method (`str`, defaults to `"total"`):
            `"total"` elects the sign of the larger sum, `"frequency"` that of the larger number of entries.
    """

    density: float = 0.2
    scaling: float = 1.0
    majority_sign_method: str = "total"

    name = "ties"
    source = "TIES-Merging, arXiv 2306.01708 (algorithm 1)"

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_finite("scaling", self.scaling)
        check_sign_method(self.majority_sign_method)

    def merge(self, tasks: Sequence[LayerTask], layer: str = "") -> LowRankDelta | Tensor:
        """`λ · TIES(ΔW_1, …, ΔW_T)`, dense."""
        tasks = trained(tasks)
        return self.combined([task.delta.B @ task.delta.A for task in tasks], tasks)

    def combined(self, matrices: list[Tensor], tasks: Sequence[LayerTask]) -> Tensor:
        """`λ · TIES` of one matrix for each task."""
        from peft.utils.merge_utils import ties  # when merging, or what reads records would need PEFT

        weights = weights_of(tasks, matrices[0])
        with unpruned_is_fine():
            return self.scaling * ties(matrices, weights, self.density, self.majority_sign_method)


def weights_of(tasks: Sequence[LayerTask], like: Tensor) -> Tensor:
    """The tasks' weights as PEFT's functions want them, in the dtype and on the device of another tensor."""
    return torch.tensor([task.weight for task in tasks], dtype=like.dtype, device=like.device)


def check_sign_method(method: str) -> None:
    """Raise `ValueError` unless PEFT knows it."""
    if method not in SIGN_METHODS:
        raise ValueError(f"`majority_sign_method` must be 'total' or 'frequency', but it is {method!r}.")


@contextlib.contextmanager
def unpruned_is_fine() -> Iterator[None]:
    """Leave out PEFT's warning for a density of 1, which may be meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density .* no pruning will be performed")
        yield
