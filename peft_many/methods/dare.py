"""DARE: drop entries of the deltas at random and rescale the others. PEFT's own implementation."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import LayerTask, MergeMethod, check_finite, check_share, trained
from .ties import check_sign_method, unpruned_is_fine, weights_of


@dataclass(frozen=True)
class _Dare(MergeMethod):
    density: float = 0.2
    scaling: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_finite("scaling", self.scaling)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"`seed` must be a whole number, but it is {self.seed!r}.")

    def merge(self, tasks: Sequence[LayerTask], layer: str = "") -> Tensor:
        """`λ · DARE(ΔW_1, …, ΔW_T)`, dense, on the tasks' device."""
        tasks = trained(tasks)
        device = tasks[0].delta.A.device
        # Random numbers differ between devices; drawn on the CPU the same seed gives the same merge everywhere.
        deltas = [(task.delta.B @ task.delta.A).cpu() for task in tasks]
        with unpruned_is_fine(), torch.random.fork_rng(devices=[]):  # PEFT's functions draw from the global generator
            # `torch.manual_seed` would seed all accelerators, too.
            torch.default_generator.manual_seed(zlib.crc32(f"{self.seed} {layer}".encode()))
            return (self.scaling * self._combined(deltas, weights_of(tasks, deltas[0]))).to(device)

    @abstractmethod
    def _combined(self, deltas: list[Tensor], weights: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DareLinear(_Dare):
    """DARE with task arithmetic: `λ Σ_t w_t drop(ΔW_t) / density`, in expectation `λ Σ_t w_t ΔW_t`.

    Entries of the dense `ΔW_t` are dropped. float32, PEFT's [`~peft.utils.merge_utils.dare_linear`]. The random
    numbers depend on the seed and the layer's name only, and the global generator is left as it was.

    Args:
        density (`float`, defaults to `0.2`):
            The share of entries to keep; the paper tunes the drop rate between 0.1 and 0.9.
        scaling (`float`, defaults to `1.0`): `λ`, a factor on the result.
        seed (`int`, defaults to `0`): Of the random numbers.
    """

    name = "dare_linear"
    source = "DARE, arXiv 2311.03099 (with task arithmetic)"

    def _combined(self, deltas: list[Tensor], weights: Tensor) -> Tensor:
        from peft.utils.merge_utils import dare_linear  # when merging, or what reads records would need PEFT

        return dare_linear(deltas, weights, self.density)


@dataclass(frozen=True)
class DareTies(_Dare):
    """DARE with the sign election and the mean of TIES, otherwise as [`DareLinear`].

    Args:
        density (`float`, defaults to `0.2`): The share of entries to keep.
        scaling (`float`, defaults to `1.0`): `λ`, a factor on the result.
        seed (`int`, defaults to `0`): Of the random numbers.
        majority_sign_method (`str`, defaults to `"total"`): As in [`Ties`].
    """

    majority_sign_method: str = "total"

    name = "dare_ties"
    source = "DARE, arXiv 2311.03099 (with TIES)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sign_method(self.majority_sign_method)

    def _combined(self, deltas: list[Tensor], weights: Tensor) -> Tensor:
        from peft.utils.merge_utils import dare_ties

        return dare_ties(deltas, weights, self.density, self.majority_sign_method)
