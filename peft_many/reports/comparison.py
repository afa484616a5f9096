"""What a merge makes of one image: which tasks it takes it for, and what routing does to the answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..data.batches import ChatCollator
from ..data.conversations import question_about
from ..records import merge_of
from ..statistics.forward import state_kept
from ..tuner.projector import ProjectorMixture, ProjectorWrapper
from .running import answers_of, inputs_of

NO_TASK = "no task (base projector)"  # where a router abstains
Routed = dict[str, tuple[ProjectorWrapper, list[str]]]  # by name, a projector and the tasks that it is routed to

# A comparison switches parts of the model off for a while, and a page has several visitors.
alone = threading.Lock()


@dataclass(frozen=True)
class Comparison:
    """What a merge makes of one image and one question.

    Args:
        weights (`dict[str, dict[str, float]]`):
            By projector and task, the routing weight; of several images or tiles the mean. What a router that abstains
            leaves to the base model's projector is there as a task of its own, `"no task (base projector)"`.
        routed (`str`): The merge's answer.
        base_projector (`str`): That of the merged LoRA behind the base model's projector: what the language model has
            learned, without routing.
        base_model (`str`): That of the base model alone.
    """

    weights: dict[str, dict[str, float]]
    routed: str
    base_projector: str
    base_model: str


def compare(model: PeftModel, processor: Any, image: Any, question: str, *, max_new_tokens: int = 64) -> Comparison:
    """Ask a merge about an image, with and without routing, and see what its router thinks of the image.

    Args:
        model ([`~peft.PeftModel`]): Its active adapter is a merge that routes its projectors.
        processor ([`~transformers.ProcessorMixin`]): The base model's, with a chat template.
        image (`PIL.Image.Image`, `str` or `os.PathLike`): The image.
        question (`str`): What to ask.
        max_new_tokens (`int`, defaults to 64): The longest answer; decoding is greedy.

    Returns:
        [`Comparison`]: Routing weights and three answers.

    Raises:
        ValueError: The active adapter routes no projector, or the processor has no chat template.
    """
    projectors = routed_projectors(model)
    collator, example = ChatCollator(processor), question_about([image], question)

    def answer() -> str:
        (said,) = answers_of(model, collator, [example], max_new_tokens=max_new_tokens)
        return said.text

    with alone, state_kept(model):
        with watched(model, projectors) as weights:
            routed = answer()
        with _unrouted(projectors):
            base_projector = answer()
        with model.disable_adapter():
            base_model = answer()
    return Comparison(weights, routed, base_projector, base_model)


def resembles(model: PeftModel, processor: Any, image: Any) -> dict[str, dict[str, float]]:
    """The weights of [`Comparison`] alone, by one forward pass; arguments and errors are those of `compare`."""
    projectors = routed_projectors(model)
    with alone, state_kept(model), torch.no_grad(), watched(model, projectors) as weights:
        model.eval()
        model(**inputs_of(model, ChatCollator(processor), question_about([image], "")))
    return weights


def routed_projectors(model: PeftModel) -> Routed:
    """The projectors that the active adapter routes."""
    if not isinstance(model, PeftModel):
        raise ValueError(f"Only merges on a `PeftModel` route images, but the model is a {type(model).__name__}.")
    merge = merge_of(model.peft_config[model.active_adapter])
    found = {
        name: (model.get_base_model().get_submodule(name), routed.names)
        for name, routed in (merge.routing.items() if merge is not None else ())
    }
    if not found:
        raise ValueError(
            f"The adapter '{model.active_adapter}' routes no projector: it is no merge, or its tasks trained none, or "
            'they were merged with `projectors="mean"`.'
        )
    return found


@contextmanager
def watched(model: PeftModel, projectors: Routed) -> Iterator[dict[str, dict[str, float]]]:
    """Note the weights that the routers find while the block runs; the last call of each counts."""
    seen: dict[str, dict[str, float]] = {}

    def note(name: str, mixture: ProjectorMixture, pooled: Tensor, weights: Tensor) -> None:
        by_task = weights.float().mean(0).tolist()
        seen[name] = dict(zip(projectors[name][1], by_task, strict=True))
        if mixture.abstain_above is not None:
            seen[name][NO_TASK] = max(0.0, 1 - sum(by_task))

    with noting(model, projectors, note):
        yield seen


@contextmanager
def noting(
    model: PeftModel, projectors: Routed, note: Callable[[str, ProjectorMixture, Tensor, Tensor], None]
) -> Iterator[None]:
    """While the block runs, tell each projector's name, router, pooled images and the weights that it finds."""

    def watch(name: str, mixture: ProjectorMixture) -> None:
        find = mixture.task_weights

        def found(pooled: Tensor) -> Tensor:
            weights = find(pooled)
            note(name, mixture, pooled, weights)
            return weights

        mixture.__dict__["task_weights"] = found
        stack.callback(mixture.__dict__.pop, "task_weights")

    with ExitStack() as stack:
        for name, (wrapper, _) in projectors.items():
            watch(name, wrapper.modules_to_save[model.active_adapter])
        yield


@contextmanager
def _unrouted(projectors: Routed) -> Iterator[None]:
    """Send images through the base model's projectors while the block runs."""
    with ExitStack() as stack:
        for wrapper, _ in projectors.values():
            stack.callback(wrapper.enable_adapters, not wrapper.disable_adapters)
            wrapper.enable_adapters(False)
        yield
