"""The precision of this package's own arithmetic, whatever a user allows for a model's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# What `set_float32_matmul_precision` calls it, and what CUDA and oneDNN do. CUDA has nothing below TF32.
_PRECISIONS = {
    torch.float32: ("highest", "ieee", "ieee"),
    torch.float16: ("high", "tf32", "tf32"),
    torch.bfloat16: ("medium", "tf32", "bf16"),
}


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the dtypes that are written; also a decorator.

    Hooks run inside a model's autocast, as in `Trainer(bf16=True)`. It would round to bfloat16 what is meant to be
    float32, and decompositions have no bfloat16 kernels on GPUs. Of float64, autocast leaves products alone.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    with contextlib.ExitStack() as off:
        for kind in filter(torch.is_autocast_enabled, kinds):
            off.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def float32_products(rounded: torch.dtype) -> Iterator[None]:
    """Float32 products of factors that were rounded to `rounded`: as quickly as a device can without rounding further.

    Of float32 that is full precision; TF32 keeps float16's ten bits, and CPUs have bfloat16's seven. What users allow
    may be less, and would drown small directions. Their setting is afterwards as before, whether made by
    `torch.set_float32_matmul_precision` or by `fp32_precision`, of which the former may know nothing.
    """
    has_parts = hasattr(torch.backends, "fp32_precision")  # since torch 2.9
    backends: Any = torch.backends
    parts: list[Any] = [backends.cuda.matmul, backends.mkldnn.matmul] if has_parts else []
    before = [part.fp32_precision for part in parts]
    word, *names = _PRECISIONS[rounded]
    whole: str | None = None
    try:
        whole = torch.get_float32_matmul_precision()
    except RuntimeError:  # the parts were set to something that it has no word for
        for part, name in zip(parts, names):
            part.fp32_precision = name
    else:
        torch.set_float32_matmul_precision(word)
    try:
        yield
    finally:
        if whole is not None:
            torch.set_float32_matmul_precision(whole)
        for part, precision in zip(parts, before):
            part.fp32_precision = "none"  # so that it follows what is set for all operations
            if part.fp32_precision != precision:
                part.fp32_precision = precision
