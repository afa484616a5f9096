"""`MergeOptions`: how a merge is made. Signatures, command line, recipes and records take their options from here."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from ..methods import LPM, METHODS, MergeMethod, as_method
from ..methods.base import ForeignMethod

ROUTERS = {"cosine": 0.02, "gaussian": 1.0}  # with their default temperatures
ROUTED, MEAN = "routed", "mean"
DEFAULT_RIDGE = 1e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How to merge adapters. [`merge_adapter_sequence`] and [`merge_adapter_files`] take each of these as a keyword.

    Options that are `None` are taken from the merges among the adapters where these agree, and else from the defaults
    given here.

    Args:
        method (`str` or [`MergeMethod`], defaults to `"lpm"`):
            How to merge the LoRA deltas: `"lpm"`, a name in `peft_many.methods.METHODS`, or an instance with options,
            such as `Ties(density=0.3)`. Not taken from merges among the adapters.
        projectors (`str`, defaults to `"routed"`):
            `"routed"` sends each image through the projectors of the tasks it resembles (CPM). `"mean"` averages the
            weights of the projectors over the tasks that trained one, and needs no prototypes.
        ridge (`float`, *optional*):
            The ridge `λ` of LPM, 1e-4 by default: the share of the mean input energy that is added in every direction.
            It pulls directions that no task's inputs reach to the tasks' mean delta. 1e-8 to 1e-3 work alike on the
            demo; 1e-2 costs accuracy.
        router (`str`, *optional*):
            How images are compared with the tasks' prototypes: `"cosine"` as in the paper, which is the default, or
            `"gaussian"`, by a Mahalanobis distance.
        temperature (`float`, *optional*):
            The temperature `τ` of the router's softmax, 0.02 by default for `"cosine"` and 1 for `"gaussian"`.
        top_k (`int`, *optional*):
            The most task projectors that an image is sent through. By default all whose weight is above 1e-6.
        abstain_above (`float`, *optional*):
            With `router="gaussian"`: images whose mean squared distance from the nearest prototype is above this go
            through the base model's projector. A task's own images are at 1 on average. By default never.
        rank (`int`, *optional*):
            The largest rank of a merged layer. By default the sum of the tasks' ranks, which is the exact optimum;
            with less, each layer gets the best delta of that rank under the same objective.
        gate_lora (`bool`, *optional*):
            Whether a row's images also choose among the tasks' own LoRA deltas. Rows without images, and those whose
            images resemble no single task, get the merged delta. Needs `method="lpm"` and routed projectors. `False`
            by default.
        dtype (`torch.dtype`, defaults to `torch.float32`):
            What the merged LoRA weights are stored in: float32, bfloat16 or float16. Half precision halves the file
            and rounds the merged deltas by about 2e-3 of their size in bfloat16 and 3e-4 in float16.

    Raises:
        ValueError: An option has an impossible value, or two do not go together.

    Example:

        ```py
        >>> from peft_many import MergeOptions

        >>> MergeOptions(ridge=1e-5, router="gaussian").describe()
        {'method': 'lpm', 'projectors': 'routed', 'ridge': 1e-05, 'router': 'gaussian', 'dtype': 'float32'}
        ```
    """

    # The metadata are what the command line shows.
    method: str | MergeMethod = field(
        default=LPM, metadata={"help": "How to merge the LoRA deltas.", "choices": (LPM, *METHODS)}
    )
    projectors: str = field(
        default=ROUTED,
        metadata={"help": "Route each image, or average the projectors' weights.", "choices": (ROUTED, MEAN)},
    )
    ridge: float | None = field(default=None, metadata={"help": "The ridge λ of LPM.", "default": "1e-4"})
    router: str | None = field(
        default=None,
        metadata={"help": "How images are compared with tasks.", "default": "cosine", "choices": tuple(ROUTERS)},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "τ of the routing.", "default": "0.02, gaussian: 1"}
    )
    top_k: int | None = field(default=None, metadata={"help": "The most projectors an image is sent through."})
    abstain_above: float | None = field(
        default=None,
        metadata={"help": "gaussian: from which distance on images go through the base model's projector."},
    )
    rank: int | None = field(default=None, metadata={"help": "The largest rank of a merged layer.", "default": "Σ r"})
    gate_lora: bool | None = field(default=None, metadata={"help": "Let images choose the LoRA too."})
    dtype: torch.dtype = field(
        default=torch.float32, metadata={"help": "Of the merged weights.", "choices": tuple(DTYPES)}
    )

    def __post_init__(self) -> None:
        method = as_method(self.method)
        object.__setattr__(self, "method", LPM if method is None else method)
        for option in dataclasses.fields(self):
            self._check(option)
        if self.merge_method is not None and self.ridge is not None:
            raise ValueError(f"`ridge` is an option of LPM; the method '{self.merge_method.name}' has none.")
        if self.projectors == MEAN:
            routing = ("router", "temperature", "top_k", "abstain_above", "gate_lora")
            given = next((name for name in routing if getattr(self, name)), None)
            if given is not None:
                raise ValueError(f"`{given}` is an option of routed projectors, not of `projectors='{MEAN}'`.")
        if self.abstain_above is not None and self.router not in (None, "gaussian"):
            raise ValueError("`abstain_above` is a distance of `router='gaussian'`; cosines know none.")
        if self.gate_lora and self.merge_method is not None:
            raise ValueError(
                f"`gate_lora` is an option of LPM; the method '{self.merge_method.name}' keeps no blocks of the tasks."
            )
        if self.gate_lora and self.rank is not None:
            raise ValueError(
                "`gate_lora` keeps every task's block of each layer, so a `rank` cannot be given; pass "
                "`gate_lora=False` or leave `rank` out."
            )

    def _check(self, option: dataclasses.Field[Any]) -> None:
        name, value, choices = option.name, getattr(self, option.name), option.metadata.get("choices")
        if value is None or name == "method":
            return
        if name == "dtype":
            if value not in DTYPES.values():
                raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES.values()))}, but it is {value}.")
        elif choices:
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, but it is {value!r}.")
        elif name == "gate_lora":
            if not isinstance(value, bool):
                raise ValueError(f"`gate_lora` must be True or False, but it is {value!r}.")
        elif name in ("top_k", "rank"):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"`{name}` must be a whole number, but it is {value!r}.")
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {value}.")
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"`{name}` must be a number, but it is {value!r}.")
        elif not (0 <= value < math.inf and (value > 0 or name == "ridge")):
            allowed = "finite and not negative" if name == "ridge" else "positive and finite"
            raise ValueError(f"`{name}` must be {allowed}, but it is {value}.")

    @property
    def merge_method(self) -> MergeMethod | None:
        """The method, `None` for LPM."""
        return self.method if isinstance(self.method, MergeMethod) else None

    def filled_in(self, merges: Sequence[MergeOptions]) -> MergeOptions:
        """The same with nothing left open that matters: what merges among the adapters agree on, or the defaults."""
        is_lpm, is_routed = self.merge_method is None, self.projectors == ROUTED
        found: dict[str, Any] = {}
        if is_lpm:
            found["ridge"] = _first(self.ridge, _agreed(merges, "ridge"), DEFAULT_RIDGE)
        if is_routed:
            router = _first(self.router, _agreed(merges, "router"), "cosine")
            alike = merges if _agreed(merges, "router") == router else []  # another router measures other distances
            found |= {
                "router": router,
                "temperature": _first(self.temperature, _agreed(alike, "temperature"), ROUTERS[router]),
                "top_k": _first(self.top_k, _agreed(merges, "top_k")),
                "abstain_above": _first(self.abstain_above, _agreed(alike, "abstain_above")),
            }
        gated = _agreed(merges, "gate_lora") if is_lpm and is_routed else None
        return replace(self, **found, gate_lora=_first(self.gate_lora, gated, False))

    def describe(self) -> dict[str, Any]:
        """The options that are set, as JSON and as a recipe has them; [`MergeOptions.read`] reads it."""
        found = {option.name: getattr(self, option.name) for option in dataclasses.fields(self)}
        found |= {"method": self.method if isinstance(self.method, str) else self.method.describe()}
        found |= {"dtype": next(name for name, dtype in DTYPES.items() if dtype == self.dtype)}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def read(cls, described: Mapping[str, Any], *, foreign: bool = False) -> MergeOptions:
        """Options from a recipe or a record, where numbers may be strings and dtypes and methods are names.

        `foreign` allows methods that are not known here; these cannot be merged with.
        """
        known = {option.name: option for option in dataclasses.fields(cls)}
        unknown = next((name for name in described if name not in known), None)
        if unknown is not None:
            raise ValueError(f"there is no option `{unknown}`; there are {', '.join(f'`{name}`' for name in known)}.")
        found: dict[str, Any] = {}
        for name, value in described.items():
            if name == "method":
                found[name] = _method(value, foreign)
            elif name == "dtype" and isinstance(value, str):
                found[name] = DTYPES.get(value, value)
            elif "float" in str(known[name].type) and isinstance(value, str):  # YAML takes 1e-4 for a string
                found[name] = number(f"`{name}`", value)
            else:
                found[name] = value
        return cls(**found)


def number(name: str, value: Any) -> float:
    """A number as YAML and command lines write it, or a `ValueError`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, but it is {value!r}.") from None


def _method(value: Any, foreign: bool) -> str | MergeMethod:
    """A method by its name, or by a mapping of its name and options."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"`method` must be a name, or a mapping with one under `name`, but it is {value!r}.")
    options = {name: option for name, option in value.items() if name not in ("name", "source")}
    kind = METHODS.get(value["name"])
    if kind is None and foreign:
        return ForeignMethod(value["name"], str(value.get("source")), options)
    if kind is None and (options or value["name"] != LPM):
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, but it is {value['name']!r}.")
    if kind is None or not options:
        return value["name"]
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"`method`: {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from None


def takes_merge_options(function: Function) -> Function:
    """Let a function with `**options` show the fields of `MergeOptions` in its signature, as `help` and editors do."""
    signature = inspect.signature(function)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
        for one in dataclasses.fields(MergeOptions)
    ]
    known = {one.name for one in (*own, *options)}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument '{unknown}'")
        return function(*args, **kwargs)

    checked.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]


def _agreed(merges: Sequence[MergeOptions], option: str) -> Any:
    """What all merges say of an option, else `None`."""
    values = [getattr(merge, option) for merge in merges]
    return values[0] if values and all(value == values[0] for value in values) else None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
