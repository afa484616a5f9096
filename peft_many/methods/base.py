"""What a merging method is: a rule that makes one delta of the tasks' deltas of a layer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..algebra.covariance import Covariance
from ..algebra.lpm import LowRankDelta


@dataclass(frozen=True)
class LayerTask:
    """One task's part in the merge of one layer.

    Args:
        delta ([`LowRankDelta`]):
            `ΔW_t = B_t A_t`, float32, the LoRA scaling folded into `A`; of rank 0 where the task did not train the
            layer.
        weight (`float`): `w_t > 0`; tasks of weight 0 are left out.
        covariance ([`Covariance`], *optional*): `C_t` of the layer's inputs, for methods that need one.
    """

    delta: LowRankDelta
    weight: float
    covariance: Covariance | None = None


@dataclass(frozen=True)
class MergeMethod(ABC):
    """A merging method; its options are the fields of the subclass, plain numbers and strings, which it validates.

    To merge with a method of your own, subclass this and pass an instance as `method=`.

    Attributes:
        name (`str`): What to pass as `method=`.
        source (`str`): The paper that it follows.
        needs_covariances (`bool`): Whether every task must be measured.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs_covariances: ClassVar[bool] = False

    @abstractmethod
    def merge(self, tasks: Sequence[LayerTask], layer: str = "") -> LowRankDelta | Tensor:
        """Merge one layer.

        Args:
            tasks (`Sequence[LayerTask]`): In an order that does not depend on the caller's; one or more trained it.
            layer (`str`): The layer's path, by which methods that draw random numbers draw others for each layer.

        Returns:
            [`LowRankDelta`] or `torch.Tensor`: Exact factors, or a dense matrix of shape `(out, in)`, of which the
            nearest delta of the merge's rank is kept (in the Frobenius norm).
        """

    def rank_of(self, ranks: Sequence[int]) -> int:
        """The rank of the merged delta where the tasks' have these; none is 0."""
        return sum(ranks)

    def describe(self) -> dict[str, Any]:
        """Name, source and options, for the record of a merge."""
        return {"name": self.name, "source": self.source, **asdict(self)}


@dataclass(frozen=True)
class ForeignMethod(MergeMethod):
    """A method that is known by its name only: a merge was made with it where it is known."""

    name: str  # type: ignore[misc]
    source: str  # type: ignore[misc]
    options: dict[str, Any]

    def merge(self, tasks: Sequence[LayerTask], layer: str = "") -> LowRankDelta | Tensor:
        raise ValueError(f"the method '{self.name}' is not one of peft_many's; merge anew with another `method`")

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "source": self.source, **self.options}


def trained(tasks: Sequence[LayerTask]) -> list[LayerTask]:
    """The tasks that trained the layer."""
    return [task for task in tasks if task.delta.A.shape[0] > 0]


def smallest_resolved(matrix: Tensor, values: Tensor) -> Tensor:
    """The smallest singular value that is told from zero in a matrix of these singular values, the largest first."""
    return max(matrix.shape) * torch.finfo(matrix.dtype).eps * values[:1].sum()  # there may be none


def check_share(name: str, value: float) -> None:
    """Raise `ValueError` unless an option is a share of something, in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must be in (0, 1], but it is {value}.")


def check_finite(name: str, value: float) -> None:
    """Raise `ValueError` unless an option is a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, but it is {value}.")
