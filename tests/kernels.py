"""Decompositions as GPUs have them: none in half precision, which the CPU hides by casting under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

_PLACES = {
    torch: ("cholesky_solve", "qr", "svd"),
    torch.linalg: (
        *("cholesky", "cholesky_ex", "eigh", "eigvalsh", "inv", "lstsq", "qr", "solve", "solve_triangular"),
        *("svd", "svdvals"),
    ),
}


def without_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let decompositions of half-precision matrices fail."""

    def strict(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                    raise RuntimeError(f"'{name}' is not implemented for '{value.dtype}'")
            return kernel(*args, **kwargs)

        return call

    for place, names in _PLACES.items():
        for name in names:
            monkeypatch.setattr(place, name, strict(name, getattr(place, name)))
