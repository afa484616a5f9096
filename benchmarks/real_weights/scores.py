"""How good answers are, in per cent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

_LONGEST_NAME = 4  # words; what is longer is a description, of which parts may be right
_ARTICLES = ("a", "an", "the")


def score(given: Sequence[str], right: Sequence[str]) -> float:
    """The mean over answers: right or not, but for case; of descriptions, the words that they share with the truth.

    Descriptions are truths of more than four words. Shared words are counted as SQuAD does it (1606.05250): F1,
    without articles.
    """
    return 100 * fmean(map(_score_of, given, right))


def _score_of(given: str, right: str) -> float:
    if len(right.split()) > _LONGEST_NAME:
        return _shared_words(given, right)
    return float(given.lower() == right.lower())


def _shared_words(given: str, right: str) -> float:
    one, other = (Counter(_words(text)) for text in (given, right))
    shared = (one & other).total()
    return 2 * shared / max(1, one.total() + other.total())


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in _ARTICLES]
