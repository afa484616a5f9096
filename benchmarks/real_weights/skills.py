"""What a base model could do before, and must not forget: English prose, and captions of what it sees."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from importlib import resources

_PARAGRAPH = re.compile(r"[A-Z][^|=+*]{120,}", re.DOTALL)  # no table, list or heading


def prose() -> str:
    """Paragraphs that describe scikit-learn's data sets: English that nobody here wrote, and no task is about."""
    folder = resources.files("sklearn.datasets") / "descr"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".rst")), key=lambda file: file.name)
    paragraphs = [part for file in files for part in re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))]
    return "\n\n".join(" ".join(one.split()) for one in paragraphs if _PARAGRAPH.match(one))


def overlap(given: Sequence[str], right: Sequence[str]) -> float:
    """How many words answers share with what is right: the mean F1, in per cent."""
    return 100 * sum(map(_shared_words, given, right)) / len(right)


def _shared_words(given: str, right: str) -> float:
    one, other = (Counter(re.findall(r"\w+", text.lower())) for text in (given, right))
    shared = (one & other).total()
    return 2 * shared / max(1, one.total() + other.total())
