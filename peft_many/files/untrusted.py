"""What the config of an adapter that somebody published may say, before anything is made or allocated by it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypedDict

from peft import PeftConfig
from torch import Tensor

from ..algebra.devices import numbers_of
from ..records import INSTRUCTION_ROUTER, RoutedProjector, RouterRecord, merge_of
from ..records.checking import check_types, nonsense
from .errors import MalformedAdapterError, unusable_config
from .peft_methods import RANKS, name_of
from .stored_delta import total_of
from .tensor_file import TensorFile
from .tensor_keys import TASK_WEIGHT

# Up to here a config is taken at its word: a LoRA of this rank is smaller than the base model's layers.
UNBACKED_RANK = 512
# What Python code raises on values of a kind that it was not written for.
NONSENSE_ERRORS = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RecursionError, TypeError)
LARGEST_CONFIG = 16 << 20  # bytes; JSON takes many times its size in memory


class _LoraFields(TypedDict, total=False):
    """What is read of the config of a LoRA adapter; PEFT annotates some of it more vaguely, or narrower than it is."""

    r: int
    lora_alpha: int | float
    lora_dropout: int | float
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, int | float] | None
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    modules_to_save: list[str] | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    layer_replication: list[list[int]] | None
    target_parameters: list[str] | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    bias: str
    init_lora_weights: bool | str | None
    base_model_name_or_path: str | None
    revision: str | None
    task_type: str | None
    auto_mapping: dict[str, Any] | None
    inference_mode: bool
    task_name: str | None
    projector_modules: list[str] | None
    energy: int | float


def check_config(config: PeftConfig, source: str) -> None:
    """Raise `MalformedAdapterError` unless what was read from a file has the types that its fields are declared with.

    Numbers must be finite and ranks positive. Records have checked themselves.
    """
    known = _LoraFields.__annotations__ if name_of(config) in ("LORA", "MANY") else {}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        if (wrong := nonsense(value)) is not None:
            raise unusable_config(source, f"`{field.name}` cannot be {wrong}")
        if field.name in known:
            found[field.name] = _as_lists(value)
    try:
        check_types(_LoraFields, found)
    except TypeError as error:
        raise unusable_config(source, str(error)) from None
    ranks = [getattr(config, "r", 1), *(getattr(config, "rank_pattern", None) or {}).values()]
    ranks = [rank for rank in ranks if isinstance(rank, int)]  # AdaLoRA's are lists of which directions it kept
    if (known or name_of(config) in RANKS) and not all(rank > 0 for rank in ranks):  # to others 0 may say "choose it"
        raise unusable_config(source, f"ranks must be positive, but it has {min(ranks)}")


def _as_lists(value: Any) -> Any:
    """Sets and tuples, which PEFT makes of some lists, as lists."""
    if isinstance(value, (list, tuple, set)):
        return [_as_lists(item) for item in value]
    return {key: _as_lists(item) for key, item in value.items()} if isinstance(value, dict) else value


def check_backed(config: Any, weights: TensorFile | None, source: str) -> None:
    """Raise `MalformedAdapterError` if a config makes PEFT allocate more than is in the weights file, if there is one.

    A file's own size bounds the shapes in it.
    """
    shapes = {} if weights is None else {key: weights.shape(key) for key in weights}
    loras = [shape for key, shape in shapes.items() if ".lora_A." in key or key.endswith(".lora_embedding_A")]
    largest = max((shape[0] for shape in loras if shape), default=0)
    rank = max(config.r, *(config.rank_pattern or {}).values(), 0)
    if rank > max(UNBACKED_RANK, largest):
        raise unusable_config(source, f"it has the rank {rank}, but its weights go up to rank {largest}")
    copies = sum(max(0, end - start) for start, end in config.layer_replication or [])
    if copies > max(UNBACKED_RANK, len(loras)):
        raise unusable_config(source, f"`layer_replication` makes {copies} layers, but it has weights of {len(loras)}")
    indices = config.trainable_token_indices or []
    tokens = sum(map(len, indices.values())) if isinstance(indices, dict) else len(indices)
    if tokens > max(UNBACKED_RANK, *(shape[0] for key, shape in shapes.items() if "trainable_tokens" in key), 0):
        raise unusable_config(source, f"it trains {tokens} tokens, but its weights hold fewer")
    merge = merge_of(config)
    if merge is None:
        return
    for projector, routed in merge.routing.items():
        _check_routing(projector, routed, shapes, source)
    if merge.instructions is not None:
        _check_router(INSTRUCTION_ROUTER, merge.instructions, shapes, source)


def _check_routing(
    projector: str, routed: RoutedProjector, shapes: Mapping[str, tuple[int, ...]], source: str
) -> None:
    inside = _check_router(projector, routed, shapes, source)
    experts: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        if key.startswith(f"{inside}experts."):
            task_key, _, part = key.removeprefix(f"{inside}experts.").partition(".")
            experts.setdefault(task_key, {})[part] = shape
    like = next(iter(experts.values()), {})
    for t, task in enumerate(routed.tasks):
        if task.trained and (not like or experts.get(f"task_{t}") != like):
            raise unusable_config(source, f"its weights lack a tensor of '{projector}' of the task '{task.name}'")


def _check_router(name: str, routed: RouterRecord, shapes: Mapping[str, tuple[int, ...]], source: str) -> str:
    """How the keys of a router's tensors begin, if these are as large as the config says."""
    ends = f".{name}.prototypes"
    inside = next((key.removesuffix("prototypes") for key in shapes if f".{key}".endswith(ends)), "")
    for part, shape in routed.shapes.items():
        found = shapes.get(f"{inside}{part}") if inside else None
        if found != shape:
            raise unusable_config(
                source, f"it routes '{name}' by {part} of shape {shape}, but its weights have {found or 'none'}"
            )
    return inside


# Of routers and gates. NaN in one would send every input to the same task, or each to none, without a word.
_DECIDING = (".prototypes", ".directions", ".variances", f".{TASK_WEIGHT}")


def check_deciding(tensors: Mapping[str, Tensor], config: PeftConfig, adapter_name: str) -> None:
    """Raise `MalformedAdapterError` naming a tensor of a merge's routers or gates that holds NaN or Inf.

    Or variances that are not positive, which distances are divided by.
    """
    if merge_of(config) is None:
        return
    source = getattr(config, "loaded_from", f"The adapter '{adapter_name}'")
    deciding = {key: tensor for key, tensor in tensors.items() if f".{key}".endswith(_DECIDING) and not tensor.is_meta}
    for key, total in zip(deciding, numbers_of([total_of(tensor) for tensor in deciding.values()])):
        where = f"{source}: tensor '{key.replace(f'.modules_to_save.{adapter_name}.', '.')}'"  # as in the file
        if not math.isfinite(total[0]):
            raise MalformedAdapterError(f"{where} holds NaN or Inf; save or merge it again.")
        if key.endswith(".variances") and not (deciding[key] > 0).all():
            raise MalformedAdapterError(f"{where} must be positive; save or merge it again.")
