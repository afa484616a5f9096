"""How answers are scored: exactly, as VQA's own evaluation does, or as captions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .captions import caption_scores, check_captions_can_be_scored
from .conversations import Example

# As in VQA's evaluation (github.com/GT-Vision-Lab/VQA); contractions are compared without their apostrophes.
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_ARTICLES = {"a", "an", "the"}
_SPACED = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!]")


def exact(answer: str, example: Example) -> float:
    """1 if the answer is one of those that are right, but for case, spaces and a stop at the end."""
    return float(_plain(answer) in {_plain(right) for right in example.right})


def vqa(answer: str, example: Example) -> float:
    """VQA's accuracy: numbers as digits, no articles and punctuation; of ten people three must have said it.

    The mean over leaving out each of the people, `min(1, others who said it / 3)`; with a single right answer, 1 if it
    is that.
    """
    given, right = vqa_words(answer), [vqa_words(one) for one in example.right]
    if len(right) < 2:
        return float(given in right)
    said = sum(one == given for one in right)
    shares = [min(1.0, (said - (one == given)) / 3) for one in right]
    return sum(shares) / len(shares)


def vqa_words(text: str) -> str:
    """An answer as VQA's evaluation compares it."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().replace("\n", " ").replace("'", ""))
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", _SPACED.sub(" ", text))
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


SCORES: dict[str, Callable[[str, Example], float]] = {"exact": exact, "vqa": vqa}
CAPTIONS = "captions"
METRICS = (*SCORES, CAPTIONS)


def check_metric(metric: str) -> None:
    """Find out that a metric is unknown, or lacks something, before hours of generation.

    Raises:
        ValueError: There is no such metric.
        ModuleNotFoundError, OSError, RuntimeError: What scores captions is not installed, or does not run.
    """
    if metric not in METRICS:
        raise ValueError(f"There is no metric {metric!r}; there are {', '.join(METRICS)}.")
    if metric == CAPTIONS:
        check_captions_can_be_scored()


def score_captions(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """What each caption metric says of the answers, in per cent, and their `"mean"`."""
    return caption_scores(answers, [example.right for example in examples])


def score(metric: str, answers: Sequence[str], examples: Sequence[Example]) -> float:
    """The mean score of answers, in per cent, by a metric that looks at each answer alone."""
    points = [SCORES[metric](answer, example) for answer, example in zip(answers, examples, strict=True)]
    return 100 * sum(points) / len(points)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")
