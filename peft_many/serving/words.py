"""What a request's words count for the tasks of a merge whose gates go by instructions, as they do with PEFT.

Its prototypes and metric are the merge's; the embeddings of its tokens are those that the server has loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.instructions import instruction_features, token_weights
from ..algebra.routing import among_all, gaussian_scores, joint_weights
from ..algebra.spread import FeatureMetric
from ..records import MergeRecord
from .merge import ServedMerge

_AT_ONCE = 1 << 12  # tokens that are embedded in one step


@dataclass(frozen=True)
class Words:
    """The router of instructions in a merge.

    Args:
        record ([`MergeRecord`]): The merge's.
        prototypes (`Tensor`): Of the tasks that instructions are compared with, `(tasks, 2 d)`.
        metric ([`FeatureMetric`]): What they are compared in.
    """

    record: MergeRecord
    prototypes: Tensor
    metric: FeatureMetric

    @classmethod
    def read(cls, merge: ServedMerge, device: torch.device) -> Words | None:
        """That of a merge; `None` if its gates do not go by instructions."""
        if merge.record.instructions is None:
            return None
        routed = merge.record.instructions
        tensors = {name: tensor.to(device).float() for name, tensor in merge.instruction_tensors()}
        shapes: dict[str, tuple[int, ...]] = {"prototypes": (len(routed.tasks), routed.width)}
        shapes |= {"directions": (routed.directions, routed.width), "variances": (routed.directions + 1,)}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
            raise ValueError(f"The merge in '{merge.folder}' lacks what instructions are compared with: {shapes}.")
        return cls(merge.record, tensors["prototypes"], FeatureMetric(tensors["directions"], tensors["variances"]))

    def scores(self, ids: Sequence[int], embed: Callable[[Tensor], Tensor]) -> Tensor:
        """How well each task explains an instruction, `(tasks,)`, on the CPU; `-inf` of those not compared with.

        Of the ids of its words, without images' placeholders, and what embeds such.
        """
        routed = self.record.instructions
        assert routed is not None
        tokens = torch.tensor([ids], dtype=torch.long, device=self.prototypes.device)
        parts = zip(tokens.split(_AT_ONCE, dim=1), token_weights(torch.ones_like(tokens)).split(_AT_ONCE, dim=2))
        features = torch.stack([instruction_features(embed(some), weights) for some, weights in parts]).sum(0)
        limits = routed.limits(self.record.options.abstain_above)
        found = gaussian_scores(features, self.prototypes, self.metric, 1.0, limits).cpu()
        places = [self.record.names.index(name) for name in routed.tasks]
        return among_all(found, places, len(self.record.tasks), missing=-torch.inf)[0]


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
