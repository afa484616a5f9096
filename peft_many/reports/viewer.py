"""A page in the browser: drop an image, see which tasks a merge takes it for, and what routing does to the answer.

    python -m peft_many.reports.viewer llava-hf/llava-1.5-7b-hf merged

The page needs Gradio (`pip install "peft-many[viewer]"`); `compare` gives the same as data and does not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from torch import Tensor

from ..records import merge_of
from ..statistics.forward import state_kept
from ..tuner.projector import ProjectorMixture, ProjectorWrapper

NO_TASK = "no task (base projector)"  # where a router abstains

# A comparison switches parts of the model off for a while, and a page has several visitors.
_alone = threading.Lock()


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
    projectors = _routed_projectors(model)
    inputs = _inputs(model, processor, image, question, prompt)
    asked = inputs["input_ids"].shape[1]

    def answer() -> str:
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        text: str = processor.tokenizer.decode(generated[0, asked:], skip_special_tokens=True)
        return text.strip()

    with _alone, state_kept(model), torch.no_grad():
        model.eval()
        with _watched(model, projectors) as weights:
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
    projectors = _routed_projectors(model)
    with _alone, state_kept(model), torch.no_grad(), _watched(model, projectors) as weights:
        model.eval()
        model(**_inputs(model, processor, image, "", prompt))
    return weights


def build(
    model: PeftModel,
    processor: Any,
    *,
    max_new_tokens: int = 64,
    prompt: Callable[[str], str] | None = None,
) -> Any:
    """The page, a `gradio.Blocks`, for those who put it among pages of their own; arguments as in [`compare`].

    Raises:
        ImportError: Gradio is not installed.
        ValueError: As in [`compare`].
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError(f'The viewer needs {error.name}: pip install "peft-many[viewer]"') from None
    names = list(_routed_projectors(model))

    def look(image: Any) -> dict[Any, Any]:
        seen = {} if image is None else resembles(model, processor, image, prompt=prompt)
        return {label: seen.get(name) for label, name in zip(weights, names)}

    def ask(image: Any, question: str) -> dict[Any, Any]:
        if image is None:
            raise gr.Error("Drop an image first.")
        found = compare(model, processor, image, question, max_new_tokens=max_new_tokens, prompt=prompt)
        seen = {label: found.weights.get(name) for label, name in zip(weights, names)}
        return {**seen, routed: found.routed, base_projector: found.base_projector, base_model: found.base_model}

    with gr.Blocks(title="peft_many: routing", analytics_enabled=False) as page:
        gr.Markdown("Drop an image to see which tasks the merge takes it for; ask, to see what routing does.")
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="pil", label="Image", elem_id="image")
                question = gr.Textbox(label="Question", elem_id="question")
                button = gr.Button("Ask", elem_id="ask", variant="primary")
            with gr.Column():
                weights = [
                    gr.Label(label=f"Resembles ({name})", elem_id=f"weights-{i}") for i, name in enumerate(names)
                ]
                routed = gr.Textbox(label="Answer of the merge", elem_id="routed")
                base_projector = gr.Textbox(
                    label="Without routing: the base model's projector", elem_id="base-projector"
                )
                base_model = gr.Textbox(label="Base model alone", elem_id="base-model")
        answers = [routed, base_projector, base_model]
        image.change(look, image, weights, api_name="resembles")
        gr.on(
            [button.click, question.submit],
            ask,
            [image, question],
            [*weights, *answers],
            api_name="ask",
        )
    return page


def launch(
    model: PeftModel,
    processor: Any,
    *,
    max_new_tokens: int = 64,
    prompt: Callable[[str], str] | None = None,
    **kwargs: Any,
) -> Any:
    """Serve the page on this machine.

    Arguments are those of [`compare`]; further keywords, such as `server_port`, go to `gradio.Blocks.launch`.

    Raises:
        ImportError: Gradio is not installed.
        ValueError: As in [`compare`].
    """
    return build(model, processor, max_new_tokens=max_new_tokens, prompt=prompt).launch(**kwargs)


def _inputs(
    model: PeftModel, processor: Any, image: Any, question: str, prompt: Callable[[str], str] | None
) -> dict[str, Any]:
    if prompt is not None:
        text = prompt(question)
    elif getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{type(processor).__name__} has no chat template to put the question into; pass `prompt=`, a function "
            "from the question to the whole text, the mark of the image included."
        )
    else:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    batch = processor(images=[image.convert("RGB")], text=[text], return_tensors="pt")
    return dict(batch.to(model.device, model.dtype))


def _routed_projectors(model: PeftModel) -> dict[str, tuple[ProjectorWrapper, list[str]]]:
    """By name, the projectors that the active adapter routes, with the tasks that they are routed to."""
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
def _watched(
    model: PeftModel, projectors: dict[str, tuple[ProjectorWrapper, list[str]]]
) -> Iterator[dict[str, dict[str, float]]]:
    """Note the weights that the routers find while the block runs; the last call of each counts."""
    seen: dict[str, dict[str, float]] = {}

    def watch(name: str, mixture: ProjectorMixture, tasks: list[str]) -> None:
        find = mixture.task_weights

        def noting(*args: Any, **kwargs: Any) -> Tensor:
            weights = find(*args, **kwargs)
            by_task = weights.float().mean(0).tolist()
            seen[name] = dict(zip(tasks, by_task, strict=True))
            if mixture.abstain_above is not None:
                seen[name][NO_TASK] = max(0.0, 1 - sum(by_task))
            return weights

        mixture.__dict__["task_weights"] = noting
        stack.callback(mixture.__dict__.pop, "task_weights")

    with ExitStack() as stack:
        for name, (wrapper, tasks) in projectors.items():
            watch(name, wrapper.modules_to_save[model.active_adapter], tasks)
        yield seen


@contextmanager
def _unrouted(projectors: dict[str, tuple[ProjectorWrapper, list[str]]]) -> Iterator[None]:
    """Send images through the base model's projectors while the block runs."""
    with ExitStack() as stack:
        for wrapper, _ in projectors.values():
            stack.callback(wrapper.enable_adapters, not wrapper.disable_adapters)
            wrapper.enable_adapters(False)
        yield


def main(
    base: Annotated[str, typer.Argument(help="The base model, by Hub id or folder.")],
    merge: Annotated[str, typer.Argument(help="The merge, by Hub id or folder.")],
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    port: Annotated[int | None, typer.Option(help="Of the page; a free one from 7860 on if not given.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 64,
) -> None:
    """Show in the browser which tasks a merge takes an image for, and what routing does to its answer."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto").to(device)
    merged = PeftModel.from_pretrained(model, merge)
    launch(merged, AutoProcessor.from_pretrained(base), max_new_tokens=max_new_tokens, server_port=port)


if __name__ == "__main__":
    typer.run(main)
