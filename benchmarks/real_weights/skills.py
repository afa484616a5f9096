"""English prose, which a base model could read before and must not forget."""

from __future__ import annotations

import re
from importlib import resources

_PARAGRAPH = re.compile(r"[A-Z][^|=+*]{120,}", re.DOTALL)  # no table, list or heading


def prose() -> str:
    """Paragraphs that describe scikit-learn's data sets: English that nobody here wrote, and no task is about."""
    folder = resources.files("sklearn.datasets") / "descr"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".rst")), key=lambda file: file.name)
    paragraphs = [part for file in files for part in re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))]
    return "\n\n".join(" ".join(one.split()) for one in paragraphs if _PARAGRAPH.match(one))
