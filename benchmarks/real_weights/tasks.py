"""The tasks: six in UCIT's spirit, others that ask something else of the same pictures, and captions to align with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import looks
from .charts import ASKED, paint_chart
from .painters import Kind, paint_anything, paint_flag, paint_icons, paint_scene, paint_thing
from .solids import SHAPES, paint_solids

Facts = dict[str, Any]
Asked = tuple[str, str]  # question, answer
_LETTERS = "ABC"
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Task:
    """One instruction-tuning task.

    Args:
        name (`str`): What it and its adapter are called.
        kind ([`Kind`]): Its pictures; tasks of the same kind share them.
        ask (`Callable`): From a picture's facts to a question and its answer.
        about (`str`): What it is like, in one line.
    """

    name: str
    kind: Kind
    ask: Callable[[Facts, np.random.Generator], Asked]
    about: str


def _thing(facts: Facts, rng: np.random.Generator) -> Asked:
    return "What is this?", facts["thing"]


def _chart(facts: Facts, rng: np.random.Generator) -> Asked:
    return ASKED[facts["chart"]], facts["largest"]


def _flag(facts: Facts, rng: np.random.Generator) -> Asked:
    return "Which country has this flag?", facts["country"]


def _icons(facts: Facts, rng: np.random.Generator) -> Asked:
    others = [number for number in range(1, facts["most"] + 1) if number != facts["count"]]
    options = rng.permutation([facts["count"], *rng.permutation(others)[: len(_LETTERS) - 1]]).tolist()
    listed = " ".join(f"{letter}. {number}" for letter, number in zip(_LETTERS, options))
    return f"How many icons are there? {listed}", _LETTERS[options.index(facts["count"])]


def _arithmetic(facts: Facts, rng: np.random.Generator) -> Asked:
    solids = facts["solids"]
    colour, shape = solids[int(rng.integers(len(solids)))]
    if rng.random() < 0.5:
        return f"Subtract all {shape}s. How many objects are left?", str(sum(one != shape for _, one in solids))
    return f"Subtract all {colour} objects. How many objects are left?", str(sum(one != colour for one, _ in solids))


def _scene(facts: Facts, rng: np.random.Generator) -> Asked:
    first, second = facts["things"]
    return "What is in this picture?", f"{_a(first)} {facts['relation']} {_a(second)}"


def _group(facts: Facts, rng: np.random.Generator) -> Asked:
    return "Is this an animal, a plant, food, a vehicle or an object?", facts["group"]


def _parts(facts: Facts, rng: np.random.Generator) -> Asked:
    return f"How many {facts['chart']} are there?", _NUMBERS[facts["count"]]


def _capital(facts: Facts, rng: np.random.Generator) -> Asked:
    return "What is the capital of this country?", facts["capital"]


def _ink(facts: Facts, rng: np.random.Generator) -> Asked:
    return "What colour are the icons?", facts["colour"]


def _count(facts: Facts, rng: np.random.Generator) -> Asked:
    shape = looks.pick(rng, SHAPES)
    return f"How many {shape}s are there?", _NUMBERS[sum(one == shape for _, one in facts["solids"])]


def _second(facts: Facts, rng: np.random.Generator) -> Asked:
    first, second = facts["things"]
    return f"What is the {first} {facts['relation']}?", second


def _sentence(facts: Facts, rng: np.random.Generator) -> Asked:
    return "What is this?", f"This is {_a(facts['thing'])}."


def _caption(facts: Facts, rng: np.random.Generator) -> Asked:
    question = looks.pick(rng, ("Describe the picture.", "What do you see?", "Give a short description of the image."))
    things = [_a(name) for name in facts["things"]]
    if len(things) == 2:
        return question, f"The picture shows {things[0]} {facts['relation']} {things[1]}."
    if facts["count"] > 1:
        return question, f"The picture shows {_NUMBERS[facts['count']]} drawings of {things[0]}."
    return question, f"The picture shows {things[0]}."


def _a(name: str) -> str:
    return name if name.endswith("s") else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


THINGS = Kind("things", 1, paint_thing)
CHARTS = Kind("charts", 2, paint_chart)
FLAGS = Kind("flags", 3, paint_flag)
ICONS = Kind("icons", 4, paint_icons)
SOLIDS = Kind("solids", 5, paint_solids)
SCENES = Kind("scenes", 6, paint_scene)
ANYTHING = Kind("anything", 7, paint_anything)

TASKS = (
    Task("objects", THINGS, _thing, "ImageNet-R: name a thing that is drawn in a style not trained on"),
    Task("charts", CHARTS, _chart, "ArxivQA: read a figure"),
    Task("flags", FLAGS, _flag, "VizWiz: know what is shown"),
    Task("icons", ICONS, _icons, "IconQA: count, and choose a letter"),
    Task("arithmetic", SOLIDS, _arithmetic, "CLEVR-Math: subtract"),
    Task("scenes", SCENES, _scene, "Flickr30k: describe a photograph"),
)
# Each asks something else of the pictures of one of the six. The last does not even that: no router can tell it apart.
SHARING = (
    Task("groups", THINGS, _group, "the pictures of objects: what kind of thing it is"),
    Task("chart-parts", CHARTS, _parts, "the pictures of charts: how many parts there are"),
    Task("capitals", FLAGS, _capital, "the pictures of flags: the capital"),
    Task("icon-colours", ICONS, _ink, "the pictures of icons: their colour"),
    Task("counting", SOLIDS, _count, "the pictures of arithmetic: how many there are, in words"),
    Task("neighbours", SCENES, _second, "the pictures of scenes: what is beside a thing"),
    Task("sentences", THINGS, _sentence, "the pictures and the question of objects, answered by a sentence"),
)
CAPTIONS = Task("captions", ANYTHING, _caption, "what the base model learns to see by")
