"""What the base model could do before, asked of every method: its own questions, which belong to no task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
from torch import nn

from . import drawing
from .model import Collator, TinyModel
from .pretraining import about_language, pretraining_examples
from .training import accuracy, log_likelihood
from .world import Example


@dataclass(frozen=True)
class BaseSkills:
    """What a model still can of what the base model could; per cent and perplexity, to be compared with the base's.

    Args:
        plain (`float`): Accuracy on the pre-training mixture: its questions, on plain pictures.
        unseen (`float`): The same questions on pictures that look like those of no task, and not like plain ones.
        perplexity (`float`): Of the answers to questions without a picture, `exp` of the mean loss of a token.
    """

    plain: float
    unseen: float
    perplexity: float


@lru_cache(maxsize=1)
def _questions(seed: int, count: int) -> tuple[list[Example], list[Example], list[Example]]:
    """Plain pictures, pictures of an unseen look, and text; fresh ones."""
    plain, unseen = (list(islice(pretraining_examples(seed, look), count)) for look in (drawing.plain, drawing.ruled))
    rng = np.random.default_rng(seed)
    return plain, unseen, [Example(None, (about_language(rng),)) for _ in range(count)]


def base_skills(tiny: TinyModel, models: Sequence[nn.Module], seed: int, count: int) -> BaseSkills:
    """Ask `count` questions of each kind of a model; of several, such as each task's own, each gets its share."""
    plain, unseen, text = _questions(10_000 + seed, count)  # the base was trained on those of seed 0
    asked = Collator(tiny, prompts_only=True)

    def mean(score: Callable[[nn.Module, Sequence[Example]], float], examples: Sequence[Example]) -> float:
        parts = [(model, examples[place :: len(models)]) for place, model in enumerate(models)]
        return sum(score(model, part) * len(part) for model, part in parts if part) / len(examples)

    return BaseSkills(
        plain=mean(lambda model, part: accuracy(model, asked, part), plain),
        unseen=mean(lambda model, part: accuracy(model, asked, part), unseen),
        perplexity=math.exp(-mean(lambda model, part: log_likelihood(model, Collator(tiny), part), text)),
    )
