"""What a request's words count for the tasks of a merge whose gates go by instructions, as they do with PEFT.

Its prototypes and metric are the merge's; the embeddings of its tokens are those that the server has loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..algebra.instructions import features_of_tokens
from ..algebra.routing import joint_weights
from ..routing.task_router import InstructionRouter
from .merge import ServedMerge


def router_of_words(merge: ServedMerge, device: torch.device) -> InstructionRouter | None:
    """What a merge compares instructions with; `None` if its gates do not go by them."""
    if merge.record.instructions is None:
        return None
    router = InstructionRouter(merge.record, device)
    try:
        router.load_state_dict(dict(merge.instruction_tensors()))
    except RuntimeError as error:
        reason = " ".join(str(error).split())  # torch's has many lines
        raise ValueError(
            f"The merge in '{merge.folder}' lacks what instructions are compared with: {reason}"
        ) from None
    return router


def scores_of_words(router: InstructionRouter, ids: Sequence[int], embed: Callable[[Tensor], Tensor]) -> Tensor:
    """How well each task explains an instruction, `(tasks,)`, as [`InstructionRouter.scores`] has it.

    Of the ids of its words, without images' placeholders, and what embeds such.
    """
    tokens = torch.tensor([ids], dtype=torch.long, device=router.prototypes.device)
    return router.scores(features_of_tokens(embed, tokens, torch.ones_like(tokens)))[0]


def placeholders(config: Any) -> set[int]:
    """The tokens that stand for images and videos in a prompt, by a model's config."""
    names = (f"{kind}_token_{end}" for kind in ("image", "video") for end in ("id", "index"))
    return {int(token) for token in (getattr(config, name, None) for name in names) if token is not None}


def weights_of_request(images: Tensor | None, scores: Tensor | None, fits: Tensor | None = None) -> Tensor | None:
    """What each task counts for a request, `(tasks,)`; zero where it is like no task's, `None` if nothing tells.

    By its images' weights, `(images, tasks)`, its words' scores, `(tasks,)`, and which tasks take each image, of the
    shape of the former; `None` if any may.
    """
    mean = None if images is None or not len(images) else images.mean(dim=0, keepdim=True)
    if scores is None:
        return None if mean is None else mean[0]
    if mean is None:
        return joint_weights(scores[None], torch.ones_like(scores)[None])[0]
    return joint_weights(scores[None], mean, None if fits is None else fits.any(dim=0, keepdim=True))[0]
