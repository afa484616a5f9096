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

from ..records import merge_of
from ..statistics.forward import state_kept
from ..tuner.projector import ProjectorMixture, ProjectorWrapper

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


def compare(
    model: PeftModel,
    processor: Any,
    image: Any,
    question: str,
    *,
    max_new_tokens: int = 64,
    prompt: Callable[[str], str] | None = None,
) -> Comparison:
    """Ask a merge about an image, with and without routing, and see what its router thinks of the image.

    Args:
        model ([`~peft.PeftModel`]): Its active adapter is a merge that routes its projectors.
        processor ([`~transformers.ProcessorMixin`]): The base model's.
        image (`PIL.Image.Image`): The image.
        question (`str`): What to ask.
        max_new_tokens (`int`, defaults to 64): The longest answer; decoding is greedy.
        prompt (`Callable[[str], str]`, *optional*):
            Makes the text that the processor gets, the mark of the image included, of the question. Defaults to the
            processor's chat template.

    Returns:
        [`Comparison`]: Routing weights and three answers.

    Raises:
        ValueError: The active adapter routes no projector, or the processor has no chat template.
    """
    projectors = routed_projectors(model)
    inputs = inputs_of(model, processor, image, question, prompt)
    asked = inputs["input_ids"].shape[1]

    def answer() -> str:
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        text: str = processor.tokenizer.decode(generated[0, asked:], skip_special_tokens=True)
        return text.strip()

    with alone, state_kept(model), torch.no_grad():
        model.eval()
        with watched(model, projectors) as weights:
            routed = answer()
        with _unrouted(projectors):
            base_projector = answer()
        with model.disable_adapter():
            base_model = answer()
    return Comparison(weights, routed, base_projector, base_model)


def resembles(
    model: PeftModel, processor: Any, image: Any, *, prompt: Callable[[str], str] | None = None
) -> dict[str, dict[str, float]]:
    """The weights of [`Comparison`] alone, by one forward pass; arguments and errors are those of `compare`."""
    projectors = routed_projectors(model)
    with alone, state_kept(model), torch.no_grad(), watched(model, projectors) as weights:
        model.eval()
        model(**inputs_of(model, processor, image, "", prompt))
    return weights


def inputs_of(
    model: PeftModel, processor: Any, image: Any, question: str, prompt: Callable[[str], str] | None
) -> dict[str, Any]:
    """One question about one image, where the model is."""
    if prompt is not None:
        text = prompt(question)
    elif getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{type(processor).__name__} has no chat template to put the question into; pass `prompt=`, a function "
            "that returns the whole prompt for a question, with the image token."
        )
    else:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    batch = processor(images=[image.convert("RGB")], text=[text], return_tensors="pt")
    return dict(batch.to(model.device, model.dtype))


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
