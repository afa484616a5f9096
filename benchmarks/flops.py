"""Counting the floating-point operations of matrix products, factorisations and solves, by dtype."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def _product_in_place(into: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _cholesky(matrix: Tensor, **_: Any) -> int:
    return matrix.numel() * matrix.shape[-1] // 3


def _cholesky_solve(right: Tensor, root: Tensor, upper: bool = False) -> int:
    return 2 * right.numel() * root.shape[-1]


def _triangular(triangle: Tensor, right: Tensor, **_: Any) -> int:
    return right.numel() * triangle.shape[-1]


def _inverse(matrix: Tensor, **_: Any) -> int:
    return 2 * matrix.numel() * matrix.shape[-1]


def _eigh(matrix: Tensor, *_: Any, **__: Any) -> int:
    return 9 * matrix.numel() * matrix.shape[-1]


# What PyTorch's own counter leaves out; leading terms, batches included.
_FORMULAS: Mapping[Any, Callable[..., int]] = {
    aten.addmm_: _product_in_place,
    aten.baddbmm_: _product_in_place,
    aten.linalg_cholesky_ex: _cholesky,
    aten.cholesky_solve: _cholesky_solve,
    aten.linalg_solve_triangular: _triangular,
    aten.linalg_inv_ex: _inverse,
    aten._linalg_eigh: _eigh,
}


class FlopCount(TorchDispatchMode):
    """Inside `with FlopCount() as count:` the operations of this thread are counted.

    `count.flops` has them by dtype; `count.uncounted` names the factorisations seen for which there is no formula.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in _FORMULAS:
            self._add(args[0].dtype, _FORMULAS[packet](*args, **kwargs))
        elif packet in flop_registry:
            self._add(out.dtype, flop_registry[packet](*args, **kwargs, out_val=out))
        elif "linalg_" in str(packet) and "check_errors" not in str(packet) and "vector_norm" not in str(packet):
            self.uncounted.add(str(packet))
        return out

    def _add(self, dtype: torch.dtype, flops: int) -> None:
        self.flops[str(dtype).removeprefix("torch.")] += flops


def count_flops(function: Callable[..., Any], *args: Any) -> tuple[dict[str, int], list[str]]:
    """The operations of `function(*args)` by dtype, and what was left out."""
    with FlopCount() as count:
        function(*args)
    return dict(count.flops), sorted(count.uncounted)


def share_of_peak(flops: Mapping[str, int], seconds: float, peak: Mapping[str, float]) -> float:
    """The time that the operations would take at the machine's peak, as a share of the time that it took."""
    return math.fsum(count / peak.get(dtype, peak["float32"]) for dtype, count in flops.items()) / seconds
