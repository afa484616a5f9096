"""Where the router of an adapter's instructions is: on the base model, in PEFT's wrapper."""

from __future__ import annotations

from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..algebra.devices import device_of
from ..records import INSTRUCTION_ROUTER, MergeRecord
from ..routing.task_router import InstructionRouter


class InstructionRouters(ModulesToSaveWrapper):
    """The routers of a model's adapters, held as PEFT and transformers hold trained copies of a module, so that they
    save, load and delete them with the rest. Nobody calls it; there is nothing that they are copies of."""

    def __init__(self, adapter_name: str, router: InstructionRouter) -> None:
        super(ModulesToSaveWrapper, self).__init__(nn.Identity(), adapter_name, router=router)

    def update(self, adapter_name: str, router: InstructionRouter | None = None, **kwargs: Any) -> None:
        if router is not None:
            self.modules_to_save[adapter_name] = router
        super().update(adapter_name, **kwargs)

    def unload_and_optionally_merge_module(self, *_: Any, **__: Any) -> nn.Module:
        """Nothing of them can be folded into a model."""
        original: nn.Module = self.original_module
        return original


def route_instructions(model: nn.Module, adapter_name: str, merge: MergeRecord) -> None:
    """Give a merge whose gates go by instructions its router, to be loaded into."""
    if merge.instructions is None:
        return
    router = InstructionRouter(merge, device_of(model))
    routers = getattr(model, INSTRUCTION_ROUTER, None)
    if routers is None:
        setattr(model, INSTRUCTION_ROUTER, InstructionRouters(adapter_name, router))
    else:
        routers.update(adapter_name, router=router)


def forget_instructions(model: nn.Module) -> None:
    """Leave nothing on a model where no adapter has a router."""
    routers: Any = getattr(model, INSTRUCTION_ROUTER, None)
    if routers is not None and not getattr(routers, "modules_to_save", None):
        delattr(model, INSTRUCTION_ROUTER)
