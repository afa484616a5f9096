"""What this package touches of PEFT and torch that they do not offer. Each has a tripwire in `test_upstream.py`.

Overridden private methods are where they are overridden (`tuner/model.py`, `tuner/projector.py`,
`tuner/merged_linear.py`, `routing/task_router.py`); the tripwires know them too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn


def prefix_of(config: PeftConfig) -> str:
    """By what a method's tensors are told from those of the base model, `"lora_"` for LoRA.

    The tuner class has it as `prefix`, but is only to be had by the same tables.
    """
    return PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]


def enter_peft_type(name: Any, config: type[PeftConfig], tuner: Any) -> None:
    """Make PEFT know a type of adapters.

    `peft.utils.register_peft_method` refuses names that are not in PEFT's own enumeration, and there is no entry point
    for plugins.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
    PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner.prefix


def default_store() -> Any:
    """The store by which the processes of the default group found each other; its `timeout` is the group's.

    What is public, `monitored_barrier`, is for the gloo backend only.
    """
    return torch.distributed.distributed_c10d._get_default_store()


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children as it holds them: what changes there, changes in the module.

    `named_children` leaves out a child's second name, and names without a child.
    """
    return module._modules


def times_written(tensor: Tensor) -> int:
    """How often a tensor was written to in place; inference tensors do not count that, and nothing public does."""
    return 0 if tensor.is_inference() else tensor._version


def wrap_method(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Let `wrapper(original, self_or_class, ...)` run in place of a method of PEFT's. Doing it again changes nothing.

    These are wrapped, since none calls anything in between that a plugin could be asked by:

    - `PeftConfig.from_pretrained`: the one call that sees an adapter's folder on every way of loading. Transformers'
      `load_adapter` asks the base class, so that an override in `MAnyConfig` would not run there, and configs of other
      types have no class of ours at all.
    - `PeftConfig.save_pretrained`: for statistics of adapters of other types.
    - `PeftModel.push_to_hub`: saves, and then writes a blank card over what saving wrote.
    - `PeftModel.create_or_update_model_card`: by which `Trainer` asks for PEFT's part of a card that it makes itself.
    """
    owner = next(base for base in owner.__mro__ if name in vars(base))
    found = vars(owner)[name]
    original = found.__func__ if isinstance(found, classmethod) else found
    if hasattr(original, "wrapped_by_peft_many"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped.wrapped_by_peft_many = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapped) if isinstance(found, classmethod) else wrapped)
