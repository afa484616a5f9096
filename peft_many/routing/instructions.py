"""What the instructions of a running call are like, and the router that an adapter compares them with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.instructions import features_of_tokens
from ..families.instructions import Instructions, instructions_of
from ..families.structure import embeddings_of, plain
from ..records import INSTRUCTION_ROUTER
from .task_router import InstructionRouter


def router_of(model: nn.Module | None, adapter_name: str) -> InstructionRouter | None:
    """The router of an adapter of a base model."""
    routers: Any = getattr(getattr(model, INSTRUCTION_ROUTER, None), "modules_to_save", {})
    return routers[adapter_name] if adapter_name in routers else None  # noqa: SIM401


@torch.no_grad()
def features_of_instructions(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[Instructions, Tensor] | None:
    """The instructions in a call of a base model, and their `instruction_features`; `None` if they cannot be read.

    They are the base model's own, whatever adapter is active.
    """
    found = instructions_of(model, arguments)
    embed = None if found is None else plain(embeddings_of(model))
    if found is None or embed is None:
        return None
    return found, features_of_tokens(embed, found.ids, found.kept)
