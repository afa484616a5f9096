"""`MergeOptions`: how a merge is made. Signatures, command line, recipes and records take their options from here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..algebra.lpm import DEFAULT_RIDGE
from ..methods import LPM, METHODS, MergeMethod, as_method
from ..methods.base import ForeignMethod
from .values import DTYPES, count, dtype, flag, not_negative, number, one_of, option_field, positive

ROUTERS = {"cosine": 0.02, "gaussian": 1.0}  # with their default temperatures
ROUTED, MEAN = "routed", "mean"
IMAGES, INSTRUCTIONS, BOTH = "images", "instructions", "both"


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
        rank (`int`, *optional*):
            The largest rank of a merged layer. By default the sum of the tasks' ranks, which is the exact optimum;
            with less, each layer gets the best delta of that rank under the same objective.
        gate_lora (`bool`, *optional*):
            Whether each row of a batch chooses among the tasks' own LoRA deltas. Rows that resemble no single task get
            the merged delta. Needs `method="lpm"` and routed projectors. `False` by default, but with `gate_by`.
        gate_by (`str`, *optional*):
            What it goes by: the row's `"images"`, which is the default, its `"instructions"`, by the base model's
            embeddings of their tokens, or `"both"`, for tasks on the same pictures and tasks without any. Needs
            adapters whose instructions were measured.
        route_by (`str`, *optional*):
            What chooses among the projectors, with `gate_by` of instructions: the `"images"`, which is the default,
            the row's `"instructions"`, or `"both"`. An image that was encoded for one question cannot be used again
            for another one then.
        abstain_above (`float`, *optional*):
            A task takes no image (with `router="gaussian"`) and no instruction whose squared distance from its
            prototype is above this, where its own new ones are at 1 on average, however many samples were measured.
            What no task takes goes through the base model's projector and layers. 3 loses hardly any of the tasks'
            own inputs from 16 to 32 measured samples of each task on. By default never.
        dtype (`torch.dtype`, defaults to `torch.float32`):
            What the merged LoRA weights are stored in: float32, bfloat16 or float16. Half precision halves the file
            and rounds the merged deltas by about 2e-3 of their size in bfloat16 and 3e-4 in float16.

    Raises:
        ValueError: An option has an impossible value, or two do not go together.

    Example:

        ```py
        >>> from peft_many import MergeOptions

        >>> options = MergeOptions(ridge=1e-5, router="gaussian")
        >>> for name, value in options.describe().items():
        ...     print(name, value)
        method lpm
        projectors routed
        ridge 1e-05
        router gaussian
        dtype float32
        ```
    """

    method: str | MergeMethod = option_field(  # noqa: RUF009
        "How to merge the LoRA deltas.", default=LPM, choices=(LPM, *METHODS)
    )
    projectors: str = option_field(
        "Route each image to the tasks' projectors, or average the projectors' weights.",
        one_of,
        default=ROUTED,
        choices=(ROUTED, MEAN),
    )
    ridge: float | None = option_field(
        "The ridge λ of the method lpm.", not_negative, of=(LPM,), inherited=True, otherwise=DEFAULT_RIDGE
    )
    router: str | None = option_field(
        "How an image is compared with the tasks' images.",
        one_of,
        of=(ROUTED,),
        inherited=True,
        otherwise="cosine",
        choices=tuple(ROUTERS),
    )
    # Another router measures other distances, so that these two are inherited along with it.
    temperature: float | None = option_field(
        "The temperature τ of the router's softmax.",
        positive,
        of=(ROUTED,),
        inherited=("router",),
        otherwise=lambda options: ROUTERS[options.router],
        by_default=f"{ROUTERS['cosine']}, gaussian: {ROUTERS['gaussian']:g}",
    )
    top_k: int | None = option_field(
        "The most projectors that an image is sent through.",
        count,
        of=(ROUTED,),
        inherited=True,
        by_default="no limit",
    )
    rank: int | None = option_field(
        "The largest rank of a merged layer.", count, by_default="the sum of the tasks' ranks"
    )
    gate_lora: bool | None = option_field(
        "Let each input choose among the tasks' LoRAs, not only their projectors.",
        flag,
        of=(LPM, ROUTED),
        inherited=True,
        otherwise=False,
    )
    gate_by: str | None = option_field(
        "What --gate-lora chooses by.",
        one_of,
        of=(LPM, ROUTED),
        inherited=("gate_lora",),
        otherwise=lambda options: IMAGES if options.gate_lora else None,
        choices=(IMAGES, INSTRUCTIONS, BOTH),
        by_default=IMAGES,
    )
    route_by: str | None = option_field(
        "What chooses among the projectors.",
        one_of,
        of=(ROUTED,),
        inherited=("gate_by",),
        otherwise=lambda options: IMAGES if options.gates_by_instructions else None,
        choices=(IMAGES, INSTRUCTIONS, BOTH),
        by_default=IMAGES,
    )
    abstain_above: float | None = option_field(
        "Use the base model's own weights for inputs that are further than this from every task; 3 loses hardly any "
        "of the tasks' own.",
        positive,
        of=(ROUTED,),
        inherited=("router", "gate_by"),
        by_default="never",
    )
    dtype: torch.dtype = option_field(  # noqa: RUF009
        "The dtype of the merged LoRA weights.", dtype, default=torch.float32, choices=tuple(DTYPES)
    )

    def __post_init__(self) -> None:
        method = as_method(self.method)
        object.__setattr__(self, "method", LPM if method is None else method)
        _check_each(self)
        _check_together(self)
        if self.gate_by is not None:
            object.__setattr__(self, "gate_lora", True)

    @property
    def gates_by_images(self) -> bool:
        """Whether images choose among the tasks' LoRAs."""
        return bool(self.gate_lora) and self.gate_by != INSTRUCTIONS

    @property
    def gates_by_instructions(self) -> bool:
        """Whether instructions choose among the tasks' LoRAs."""
        return self.gate_by in (INSTRUCTIONS, BOTH)

    @property
    def merge_method(self) -> MergeMethod | None:
        """The method, `None` for LPM."""
        return self.method if isinstance(self.method, MergeMethod) else None

    def filled_in(self, merges: Sequence[MergeOptions]) -> MergeOptions:
        """The same with nothing left open that matters: what merges among the adapters agree on, or the defaults."""
        return _filled_in(self, merges)

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


def _check_each(options: MergeOptions) -> None:
    """Refuse values that an option cannot have, and options that mean nothing here."""
    for option in dataclasses.fields(options):
        name, value, about = option.name, getattr(options, option.name), option.metadata
        if value is None:
            continue
        if about["check"] is not None:
            about["check"](name, value, about["choices"])
        if value is False or name == "method":
            continue
        if LPM in about["of"] and options.merge_method is not None:
            raise ValueError(f"`{name}` is an option of the method 'lpm', not of '{options.merge_method.name}'.")
        if ROUTED in about["of"] and options.projectors == MEAN:
            raise ValueError(f"`{name}` is an option of routed projectors, not of `projectors='{MEAN}'`.")


def _check_together(options: MergeOptions) -> None:
    """Refuse options that contradict each other."""
    if (
        options.abstain_above is not None
        and options.router not in (None, "gaussian")
        and not options.gates_by_instructions
    ):
        raise ValueError(
            "`abstain_above` needs distances, which `router='cosine'` has none of: pass `router='gaussian'`, or "
            "`gate_by='instructions'`."
        )
    if options.gate_by is not None and options.gate_lora is False:
        raise ValueError("`gate_by` needs `gate_lora=True`, but it is False; leave one of them out.")
    if options.route_by not in (None, IMAGES) and not options.gates_by_instructions:
        raise ValueError(f"`route_by='{options.route_by}'` needs `gate_by='{INSTRUCTIONS}'` or '{BOTH}' beside it.")
    if (options.gate_lora or options.gate_by) and options.rank is not None:
        raise ValueError(
            "`gate_lora` keeps every task's block of each layer, so a `rank` cannot be given; pass "
            "`gate_lora=False` or leave `rank` out."
        )


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


def _filled_in(found: MergeOptions, merges: Sequence[MergeOptions]) -> MergeOptions:
    for option in dataclasses.fields(found):
        name, about = option.name, option.metadata
        is_idle = (LPM in about["of"] and found.merge_method is not None) or (
            ROUTED in about["of"] and found.projectors != ROUTED
        )
        if getattr(found, name) is not None or not about["inherited"] or (is_idle and about["otherwise"]):
            continue
        along = () if about["inherited"] is True else about["inherited"]
        is_alike = all(_agreed(merges, one) == getattr(found, one) for one in along)
        value = _agreed(merges, name) if is_alike and not is_idle else None
        if value is None:
            value = about["otherwise"](found) if callable(about["otherwise"]) else about["otherwise"]
        found = replace(found, **{name: value})
    return found


def _agreed(merges: Sequence[MergeOptions], option: str) -> Any:
    """What all merges say of an option, else `None`."""
    values = [getattr(merge, option) for merge in merges]
    return values[0] if values and all(value == values[0] for value in values) else None
