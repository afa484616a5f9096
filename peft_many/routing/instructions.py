"""Which tasks a batch's instructions are like: the router for merges with `gate_by` of instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..algebra.instructions import instruction_features, token_weights
from ..algebra.routing import among_all, gaussian_scores
from ..families.instructions import Instructions, instructions_of
from ..records import INSTRUCTION_ROUTER
from .task_router import TaskRouter

# Tokens of a batch that are looked at in one step, 100 MB in bfloat16 and float32 if they are 4096 wide.
_AT_ONCE = 1 << 12


class InstructionRouter(TaskRouter):
    """Compares instructions with the tasks' by a Mahalanobis distance.

    Args:
        tasks (`int`): Of the merge.
        columns (`Sequence[int]`): The place among them of each task that is compared with.
        width (`int`): Features of a prototype.
        directions (`int`): How many directions the metric has.
        limits (`Sequence[float]`, *optional*): By task, from which squared distance on a row is not like its own.
        uses_images (`bool`): Whether a row's images count too.
        device (`torch.device`): Where the buffers are.
    """

    def __init__(
        self,
        tasks: int,
        columns: Sequence[int],
        width: int,
        directions: int,
        limits: Sequence[float] | None,
        uses_images: bool,
        device: torch.device,
    ) -> None:
        super().__init__(len(columns), width, directions, device)
        self.tasks = tasks
        self.columns = list(columns)
        self.limits = None if limits is None else list(limits)
        self.uses_images = uses_images

    def scores(self, features: Tensor) -> Tensor:
        """How well each task explains a row's instruction, log-likelihoods up to a constant of the row.

        From `instruction_features`, `(rows, 2 d)`, to `(rows, tasks)`, float32, on the CPU, which decides by them;
        `-inf` for tasks that are not compared with, or that a row is not like.
        """
        metric = self.metric
        assert metric is not None
        found = gaussian_scores(features, self.prototypes.to(features.device), metric, 1.0, self.limits).cpu()
        return among_all(found, self.columns, self.tasks, missing=-torch.inf)


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
    embed = None if found is None else _embedding(model)
    if found is None or embed is None:
        return None
    tokens = max(1, _AT_ONCE // len(found.ids))
    parts = zip(found.ids.split(tokens, dim=1), token_weights(found.kept).split(tokens, dim=2))
    return found, torch.stack([instruction_features(embed(ids), weights) for ids, weights in parts]).sum(0)


def _embedding(model: Any) -> Any:
    """The base model's own token embedding."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no language model of transformers
        return None
    if isinstance(embedding, AuxiliaryTrainingWrapper):
        return embedding.original_module
    return embedding.get_base_layer() if isinstance(embedding, BaseTunerLayer) else embedding
