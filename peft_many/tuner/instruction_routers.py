"""Where the router of an adapter's instructions is: on the base model, by the adapter's name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..records import MergeRecord
from ..routing.instructions import ROUTERS, InstructionRouter


def route_instructions(model: nn.Module, adapter_name: str, merge: MergeRecord) -> None:
    """Give a merge whose gates go by instructions its router, to be loaded into."""
    routed = merge.instructions
    if routed is None:
        return
    here = (parameter.device for parameter in model.parameters() if not parameter.is_meta)  # or else it is offloaded
    device = next(here, torch.device("cpu"))
    above = merge.options.abstain_above
    columns = [merge.names.index(name) for name in routed.tasks]
    router = InstructionRouter(
        len(merge.tasks),
        columns,
        routed.width,
        routed.directions,
        None if above is None else above * routed.distance,
        merge.options.gates_by_images,
        device,
    )
    if getattr(model, ROUTERS, None) is None:
        setattr(model, ROUTERS, nn.ModuleDict())
    routers: Any = getattr(model, ROUTERS)
    routers[adapter_name] = router


def forget_instructions(model: nn.Module, adapter_name: str | None = None) -> None:
    """Take an adapter's router away again, or all of them."""
    routers: Any = getattr(model, ROUTERS, None)
    for name in [name for name in routers or () if adapter_name in (None, name)]:
        del routers[name]
    if routers is not None and not routers:
        delattr(model, ROUTERS)


def named_for(key: str, adapter_name: str) -> str:
    """The key of a tensor in an adapter's file as it is called in the model, if it is one of its router."""
    around, found, rest = key.rpartition(f"{ROUTERS}.")
    return f"{around}{found}{adapter_name}.{rest}" if found and not rest.startswith(f"{adapter_name}.") else key
