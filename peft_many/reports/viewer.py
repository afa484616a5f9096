"""A page in the browser: drop an image, or a folder of them, and see which tasks a merge takes them for.

    python -m peft_many.reports.viewer llava-hf/llava-1.5-7b-hf merged

The page needs Gradio (`pip install "peft-many[viewer]"`); `compare` gives the same as data and does not.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from peft import PeftModel

from ..hub.sources import find_adapter
from .comparison import NO_TASK, Comparison, compare, resembles, routed_projectors
from .running import RunningMerge

__all__ = ["NO_TASK", "Comparison", "build", "compare", "launch", "resembles"]


def build(model: PeftModel, processor: Any, *, max_new_tokens: int = 64) -> Any:
    """The page, a `gradio.Blocks`, for those who put it among pages of their own; arguments as in [`compare`].

    Raises:
        ImportError: Gradio is not installed.
        ValueError: As in [`compare`].
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError(f'The viewer needs {error.name}: pip install "peft-many[viewer]"') from None
    from .viewer_of_many import many_images

    with gr.Blocks(title="peft_many: routing", analytics_enabled=False) as page:
        with gr.Tab("One image"):
            _one_image(gr, model, processor, max_new_tokens)
        with gr.Tab("Many images"):
            many_images(gr, model, processor, max_new_tokens)
    return page


def _one_image(gr: Any, model: PeftModel, processor: Any, max_new_tokens: int) -> None:
    names = list(routed_projectors(model))

    def look(image: Any) -> dict[Any, Any]:
        seen = {} if image is None else resembles(model, processor, image)
        return {label: seen.get(name) for label, name in zip(weights, names)}

    def ask(image: Any, question: str) -> dict[Any, Any]:
        if image is None:
            raise gr.Error("Drop an image first.")
        found = compare(model, processor, image, question, max_new_tokens=max_new_tokens)
        seen = {label: found.weights.get(name) for label, name in zip(weights, names)}
        return {**seen, routed: found.routed, base_projector: found.base_projector, base_model: found.base_model}

    gr.Markdown("Drop an image to see which tasks it resembles, and ask a question to see what routing changes.")
    with gr.Row():
        with gr.Column():
            image = gr.Image(type="pil", label="Image", elem_id="image")
            question = gr.Textbox(label="Question", elem_id="question")
            button = gr.Button("Ask", elem_id="ask", variant="primary")
        with gr.Column():
            weights = [gr.Label(label=f"Resembles ({name})", elem_id=f"weights-{i}") for i, name in enumerate(names)]
            routed = gr.Textbox(label="Answer of the merge", elem_id="routed")
            base_projector = gr.Textbox(label="Without routing: the base model's projector", elem_id="base-projector")
            base_model = gr.Textbox(label="Base model alone", elem_id="base-model")
    answers = [routed, base_projector, base_model]
    image.change(look, image, weights, api_name="resembles")
    gr.on([button.click, question.submit], ask, [image, question], [*weights, *answers], api_name="ask")


def launch(model: PeftModel, processor: Any, *, max_new_tokens: int = 64, **kwargs: Any) -> Any:
    """Serve the page on this machine.

    Arguments are those of [`compare`]; further keywords, such as `server_port`, go to `gradio.Blocks.launch`.

    Raises:
        ImportError: Gradio is not installed.
        ValueError: As in [`compare`].
    """
    return build(model, processor, max_new_tokens=max_new_tokens).launch(**kwargs)


def main(
    base: Annotated[str, typer.Argument(help="The base model, by Hub id or folder.")],
    merge: Annotated[str, typer.Argument(help="The merge, by Hub id or folder.")],
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    port: Annotated[int | None, typer.Option(help="The page's port; the first free one from 7860 by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 64,
) -> None:
    """Show in the browser which tasks a merge takes an image for, and what routing does to its answer."""
    running = RunningMerge.load(find_adapter(merge), [], base_model=base, device=device, hub={})
    launch(running.model, running.collator.processor, max_new_tokens=max_new_tokens, server_port=port)


if __name__ == "__main__":
    typer.run(main)
