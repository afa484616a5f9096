"""Covariances and other tensors in a statistics file: each is checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..algebra.covariance import Covariance, DenseCovariance, InvalidCovarianceError, LowRankCovariance
from ..algebra.eight_bits import Scales
from .errors import StatisticsError
from .tensor_file import TensorFile


def check_covariance(covariance: Covariance, where: str) -> None:
    """Raise `StatisticsError` naming `where` if the numbers are no covariance."""
    try:
        covariance.check()
    except InvalidCovarianceError as error:
        raise StatisticsError(f"{where} is not a covariance: {error}.") from None


def read_covariance(file: TensorFile, key: str, about: Mapping[str, Any]) -> Covariance:
    """The covariance whose tensors are called `key` and more; `about` are its numbers, from the header."""
    remainder = float(about["remainder"])
    if "scale" not in about:
        return DenseCovariance(remainder, read_tensor(file, f"{key}.matrix", 2))
    scale = float(about["scale"])
    if f"{key}.row_scales" not in file:
        return LowRankCovariance(remainder, read_tensor(file, f"{key}.factor", 2), scale)
    numbers = read_tensor(file, f"{key}.factor", 2, torch.int8)
    columns = read_tensor(file, f"{key}.column_exponents", 1, torch.int8)
    return LowRankCovariance(remainder, numbers, scale, Scales(read_tensor(file, f"{key}.row_scales", 1), columns))


def read_tensor(file: TensorFile, key: str, dimensions: int, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of this dtype, or of a floating-point one."""
    if key not in file:
        raise StatisticsError(f"{file.path} lacks the tensor '{key}'.")
    tensor = file[key]
    if not (tensor.is_floating_point() if dtype is None else tensor.dtype == dtype):
        wanted = "a floating-point one" if dtype is None else dtype
        raise StatisticsError(f"{file.path}: tensor '{key}' has dtype {tensor.dtype}, not {wanted}.")
    if tensor.dim() != dimensions:
        shape = tuple(tensor.shape)
        raise StatisticsError(f"{file.path}: tensor '{key}' has shape {shape}, not {dimensions} dimensions.")
    return tensor
