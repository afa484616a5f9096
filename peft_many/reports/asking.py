"""`ask_merge`: a question to a merge, with what its routers and gates made of it, and what the others would say."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from typing_extensions import Unpack

from ..data.conversations import Example, question_about
from ..data.reading import opened
from ..hub.sources import HubArguments, find_adapter
from ..routing.row_weights import remembered
from ..statistics.forward import state_kept
from .comparison import routed_projectors, watched
from .running import RunningMerge, Said, answers_of, inputs_of

MERGED_LORA = "merged LoRA"  # where a gate chooses no task's own


@dataclass(frozen=True)
class Answer:
    """What a merge says to a question, and why.

    Args:
        question (`str`): What was asked.
        answer (`str`): What the merge said.
        routing (`dict[str, dict[str, float]]`):
            By projector and task, what the task's projector counted for the images, of several the mean; empty if
            there are no images, or if nothing is routed.
        gate (`dict[str, float]`):
            By task, what its own LoRA counted, and what the merged one did (`"merged LoRA"`); empty without a gate.
        others (`dict[str, str]`): With `compare`, what the base model said, and each task's adapter alone.
        cut_short (`bool`): Whether the merge's answer had as many tokens as it may have, and no end.
    """

    question: str
    answer: str
    routing: dict[str, dict[str, float]] = field(default_factory=dict)
    gate: dict[str, float] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    cut_short: bool = False


def ask_merge(
    merge: str | os.PathLike[str],
    question: str,
    images: Any = (),
    *,
    compare: bool = False,
    base_model: str | os.PathLike[str] | None = None,
    processor: Any = None,
    system: str | None = None,
    max_new_tokens: int = 64,
    device: str | torch.device | None = None,
    model_options: Mapping[str, Any] | None = None,
    **hub: Unpack[HubArguments],
) -> Answer:
    """Ask a merge something, and see which of its tasks it took the question for.

    Arguments that are not listed are as in [`measure_adapter`].

    Args:
        merge (`str` or `os.PathLike`): A merge, or the adapter of one task: a folder or a Hub id.
        question (`str`): What to ask.
        images (`str`, `os.PathLike`, `PIL.Image.Image` or a list of them): What to ask it about.
        compare (`bool`, defaults to `False`):
            Ask the base model and each task's adapter alone, too. These are taken from the merge.
        max_new_tokens (`int`, defaults to 64): The longest answer; decoding is greedy.

    Returns:
        [`Answer`]: The answer, the routing weights, and the others' answers.

    Raises:
        ValueError: An image cannot be read, or the processor takes none or has no chat template.
        FileNotFoundError: The merge or its base model are not there.

    Example:

        ```py
        >>> from peft_many import ask_merge

        >>> question, options = "What colour is it ?", {"max_new_tokens": 2}
        >>> found = ask_merge("merged", question, "red.png", base_model="base", **options)
        >>> sorted(found.routing["model.multi_modal_projector"])
        ['clevr', 'iconqa']
        ```
    """
    several: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
    example = question_about([opened(one) for one in several], question)  # before a model is loaded for it
    running = RunningMerge.load(
        find_adapter(merge, **hub),
        [example],
        base_model=base_model,
        processor=processor,
        system=system,
        device=device,
        model_options=model_options,
        hub=hub,
    )
    said: dict[str, Said] = {}
    for name, context in running.contexts(running.tasks if compare else (), base=compare):
        with context:
            (said[name],) = answers_of(running.model, running.collator, [example], max_new_tokens=max_new_tokens)
    routing, gate = decided(running, example)
    own, *others = said
    heard = {name: said[name].text for name in others}
    return Answer(question, said[own].text, routing, gate, heard, cut_short=not said[own].ended)


def decided(running: RunningMerge, example: Example) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """What the routers and the gate of a merge make of a question: see [`Answer`]."""
    model, merge = running.model, running.merge
    if merge is None:
        return {}, {}
    projectors = routed_projectors(model) if merge.routing else {}
    with state_kept(model), torch.inference_mode(), watched(model, projectors) as routing:
        output = model(**inputs_of(model, running.collator, example), use_cache=True)
    known = remembered(getattr(output, "past_key_values", None)).get("default")
    if not merge.options.gate_lora:
        return routing, {}
    gates = None if known is None else known.gates((1,) * len(merge.names), 1, torch.float32, torch.device("cpu"))
    if gates is None:
        return routing, {**dict.fromkeys(merge.names, 0.0), MERGED_LORA: 1.0}
    by_task = dict(zip(merge.names, gates.own[0].tolist(), strict=True))
    return routing, {**by_task, MERGED_LORA: 0.0 if gates.merged is None else gates.merged[0].item()}
