"""Other merging methods behind one interface: what `method=` of the merging functions takes.

A method enters if it merges each layer by itself, from the tasks' deltas and covariances; files and models are not
known here. LPM, the default, is in `peft_many.algebra.lpm`.
"""

from .average import Average
from .base import LayerTask, MergeMethod
from .core_space import CoreSpace
from .dare import DareLinear, DareTies
from .knots import Knots
from .regmean import RegMean
from .robust_merge import RobustMerge
from .task_arithmetic import TaskArithmetic
from .ties import Ties

LPM = "lpm"
METHODS: dict[str, type[MergeMethod]] = {
    method.name: method
    for method in (Average, TaskArithmetic, Ties, DareLinear, DareTies, RegMean, Knots, CoreSpace, RobustMerge)
}


def as_method(method: str | MergeMethod) -> MergeMethod | None:
    """The method of that name with its default options; `None` for `"lpm"`, the merging functions' own."""
    if method == LPM:
        return None
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    if isinstance(method, MergeMethod):
        return method
    raise ValueError(
        f"unknown method {method!r}; known: {', '.join([LPM, *METHODS])}, and instances of `MergeMethod`."
    )


def without_statistics() -> list[str]:
    """The names of the methods that merge adapters that were never measured."""
    return [name for name, method in METHODS.items() if not method.needs_covariances]


__all__ = [
    "LPM",
    "METHODS",
    "Average",
    "CoreSpace",
    "DareLinear",
    "DareTies",
    "Knots",
    "LayerTask",
    "MergeMethod",
    "RegMean",
    "RobustMerge",
    "TaskArithmetic",
    "Ties",
    "as_method",
    "without_statistics",
]
