"""Tasks as what is asked in them, for measuring how well instructions tell tasks apart."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

SYSTEM = "You are a helpful assistant who answers questions about pictures. Always be brief and polite."

_WORLD = """
    river stone garden window market engine letter winter doctor school bridge village mountain kitchen pocket paper
    island forest music number story animal person friend water fire house street train money bread ocean planet castle
    farmer teacher soldier painter dream voice shadow morning evening table chair guitar monkey mushroom
"""
_ACTIONS = "finds takes gives shows makes keeps brings leaves holds moves opens closes builds breaks paints sells"
_NOUNS, _VERBS = _WORLD.split(), _ACTIONS.split()
_COLOURS = ["red", "blue", "green", "purple", "yellow", "brown", "gray", "black", "white", "orange"]
_SOLIDS = ["cubes", "spheres", "cylinders", "cones", "pyramids"]
_PLACES = ("doing", "made of", "next to", "looking at")
_WHERE = (" in the image.", ".", " in this picture.")
_BOXES = ("Provide the bounding box of", "Give the bounding box of", "Where is", "Locate")

# What is asked, of a source of chance and two different nouns.
Asked = Callable[[random.Random, str, str], str]


def _text(rng: random.Random, least: int = 10, most: int = 40) -> str:
    parts = []
    for _ in range(rng.randint(least, most)):
        end = rng.choice(("", f" near the {rng.choice(_NOUNS)}", f" without a {rng.choice(_NOUNS)}"))
        parts.append(f"The {rng.choice(_NOUNS)} {rng.choice(_VERBS)} the {rng.choice(_NOUNS)}{end}.")
    return " ".join(parts)


def _options(rng: random.Random) -> str:
    return " ".join(f"{letter}. {noun}" for letter, noun in zip("ABCD", rng.sample(_NOUNS, 4)))


def _number(rng: random.Random) -> int:
    return rng.randint(2, 99)


# About pictures, in the words of `real_weights`: the same question in all of a task, or with a word that changes.
_PICTURES: dict[str, Asked] = {
    "objects": lambda rng, a, b: "What is this?",
    "sentences": lambda rng, a, b: "What is this?",  # as `objects`, with another answer: nothing tells them apart
    "groups": lambda rng, a, b: "Is this an animal, a plant, food, a vehicle or an object?",
    "flags": lambda rng, a, b: "Which country has this flag?",
    "capitals": lambda rng, a, b: "What is the capital of this country?",
    "charts": lambda rng, a, b: "Which colour is the line that ends highest?",
    "chart parts": lambda rng, a, b: f"How many {rng.choice(('lines', 'bars', 'slices'))} are there?",
    "counting": lambda rng, a, b: f"How many {rng.choice(_SOLIDS)} are there?",
    "arithmetic": lambda rng, a, b: f"Subtract all {rng.choice(_COLOURS)} objects. How many objects are left?",
    "icons": lambda rng, a, b: "How many icons are there? A. {} B. {} C. {}".format(*rng.sample(range(1, 9), 3)),
    "icon colours": lambda rng, a, b: "What colour are the icons?",
    "scenes": lambda rng, a, b: f"Is there a {a} in the picture?",
    "neighbours": lambda rng, a, b: f"What is the {a} {rng.choice(('to the right of', 'above', 'below'))}?",
    "boxes": lambda rng, a, b: (
        f"{rng.choice(_BOXES)} the {a}{rng.choice((' in the image.', '.', ' in this picture.'))}"
    ),
}
# Pairs that only order or a word tells apart, the same question with three kinds of answers, and long texts behind or
# before a short instruction.
_WORDS: dict[str, Asked] = {
    "left and above": lambda rng, a, b: f"What is to the left of the {a} and above the {b}?",
    "above and left": lambda rng, a, b: f"What is above the {a} and to the left of the {b}?",
    "larger": lambda rng, a, b: f"Is the {a} larger than the {b}?",
    "smaller": lambda rng, a, b: f"Is the {a} smaller than the {b}?",
    "in a word": lambda rng, a, b: f"What is the {a} {rng.choice(_PLACES)}? Answer with a single word or phrase.",
    "in a sentence": lambda rng, a, b: f"What is the {a} {rng.choice(_PLACES)}? Answer with a complete sentence.",
    "by letter": lambda rng, a, b: f"What is the {a} {rng.choice(_PLACES)}? {_options(rng)} Answer with the letter.",
    "summaries": lambda rng, a, b: f"Summarize the following text in one sentence.\n{_text(rng)}",
    "translations": lambda rng, a, b: f"Translate the following text to French.\n{_text(rng)}",
    "titles": lambda rng, a, b: f"{_text(rng)}\nWrite a title for this text.",
    "keywords": lambda rng, a, b: f"{_text(rng)}\nList the keywords of this text.",
    "reviews": lambda rng, a, b: f"Is this review positive or negative? {_text(rng, 1, 4)}",
    "what is left": lambda rng, a, b: (
        f"The {a} has {_number(rng)} apples and gives {_number(rng)} to the {b}. How many are left?"
    ),
    "products": lambda rng, a, b: f"The {a} buys {_number(rng)} boxes of {_number(rng)} {b}s. How many is that?",
    "programs": lambda rng, a, b: f"Write a Python function that {rng.choice(_VERBS)} a {a} and returns the {b}.",
}
TASKS = {**_PICTURES, **_WORDS}


def instructions(count: int, seed: int, tasks: Sequence[str] = tuple(TASKS)) -> dict[str, list[str]]:
    """`count` instructions of each task; other seeds give others."""
    found = {}
    for name in tasks:
        rng = random.Random(f"{seed} {name}")
        found[name] = [TASKS[name](rng, *rng.sample(_NOUNS, 2)) for _ in range(count)]
    return found
