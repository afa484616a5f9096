"""The viewer's page for a folder of images: a map of them as the router sees them, and all their answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from PIL import Image
from tqdm.auto import tqdm

from .comparison import NO_TASK, compare, routed_projectors
from .image_map import UNDECIDED, ImageMap, map_images

_PROTOTYPES = "prototypes"
# Okabe and Ito's colours, which people see who tell few of them apart; then again from the first.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_GREYS = {UNDECIDED: "#BBBBBB", NO_TASK: "#777777", _PROTOTYPES: "#000000"}
_TABLE = ("image", "taken for", "weight", "merge", "base model")


def many_images(gr: Any, model: PeftModel, processor: Any, max_new_tokens: int) -> None:
    """Put the page's components into the `gradio.Blocks` that is being built."""
    names = list(routed_projectors(model))
    bar = gr.Progress(track_tqdm=True)

    def look(files: Sequence[str] | None, progress: Any = bar) -> Any:
        images = [file for file in files or () if _is_image(file)]
        if not images:
            raise gr.Error("There is no image among these files.")
        return images, map_images(model, processor, images)

    def show(images: Sequence[str], maps: dict[str, ImageMap], name: str, factor: float) -> Any:
        found = maps.get(name)
        if found is None:
            return None, None
        return points(found, images, factor), rows(found, images, factor)

    def ask(
        images: Sequence[str],
        maps: dict[str, ImageMap],
        name: str,
        factor: float,
        question: str,
        progress: Any = bar,
    ) -> Any:
        if not images:
            raise gr.Error("Drop some images first.")
        answers = []
        for image in tqdm(images, desc="Asking"):
            said = compare(model, processor, image, question, max_new_tokens=max_new_tokens)
            answers.append((said.routed, said.base_model))
        return rows(maps[name], images, factor, answers)

    gr.Markdown("Drop a folder of images to see where each lies among the tasks' prototypes.")
    files = gr.File(file_count="directory", label="A folder of images", elem_id="files")
    several = gr.UploadButton("Or choose images", file_count="multiple", file_types=["image"], elem_id="several")
    projector = gr.Dropdown(names, value=names[0], label="Projector", visible=len(names) > 1)
    factor = gr.Slider(0.1, 10, 1, step=0.1, label="Temperature, as a multiple of the merge's", elem_id="temperature")
    plot = _plot(gr, _tasks_of(model))
    question = gr.Textbox(label="Question", elem_id="question-of-all")
    button = gr.Button("Ask all", elem_id="ask-all", variant="primary")
    table = gr.Dataframe(headers=list(_TABLE), label="Images", elem_id="table", wrap=True)
    kept, maps = gr.State([]), gr.State({})
    shown = [kept, maps, projector, factor]
    for source in (files, several):
        source.upload(look, source, [kept, maps], api_name=False).then(show, shown, [plot, table], api_name=False)
    for changed in (factor.release, projector.change):
        changed(show, shown, [plot, table], api_name=False)
    button.click(ask, [*shown, question], table, api_name=False)


def _plot(gr: Any, tasks: Sequence[str]) -> Any:
    return gr.ScatterPlot(
        x="x",
        y="y",
        color="taken for",
        color_map=_colours([*tasks, *_GREYS]),
        tooltip="all",
        x_title=" ",
        y_title=" ",
        height=420,
        elem_id="map",
    )


def points(found: ImageMap, images: Sequence[str], factor: float = 1.0) -> Any:
    """The map's points, images and prototypes, as a `pandas.DataFrame`."""
    belongs = found.belongs(found.temperature * factor)
    at, prototypes = found.positions()
    of_images = [(*xy, task, Path(image).name) for xy, task, image in zip(at.tolist(), belongs, images)]
    of_tasks = [(*xy, _PROTOTYPES, f"prototype of {task}") for xy, task in zip(prototypes.tolist(), found.tasks)]
    return _frame([*of_images, *of_tasks], ["x", "y", "taken for", "image"])


def rows(
    found: ImageMap, images: Sequence[str], factor: float = 1.0, answers: Iterable[tuple[str, str]] | None = None
) -> Any:
    """The table's rows, the undecided first, as a `pandas.DataFrame`."""
    weights = found.weights(found.temperature * factor).max(dim=1).values.tolist()
    names = [Path(image).name for image in images]
    said = list(answers) if answers is not None else [("", "")] * len(names)
    found_rows = [
        (name, task, round(weight, 3), *texts)
        for name, task, weight, texts in zip(names, found.belongs(found.temperature * factor), weights, said)
    ]
    return _frame(sorted(found_rows, key=lambda row: row[2]), _TABLE)


def _frame(rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> Any:
    import pandas  # comes with Gradio

    return pandas.DataFrame(rows, columns=list(columns))


def _tasks_of(model: PeftModel) -> list[str]:
    return list(dict.fromkeys(task for _, tasks in routed_projectors(model).values() for task in tasks))


def _colours(names: Sequence[str]) -> dict[str, str]:
    return {name: _GREYS.get(name, _COLOURS[i % len(_COLOURS)]) for i, name in enumerate(names)}


def _is_image(file: str) -> bool:
    try:
        with Image.open(file) as image:
            image.verify()
    except (OSError, SyntaxError):
        return False
    return True
