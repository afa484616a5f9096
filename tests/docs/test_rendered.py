"""What the docs' tool shows: docstrings as PEFT writes them, in its words, and code that is not wider than a page."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator

import pytest

from tests.docs.pages import PAGES, ROOT

FENCE = re.compile(r"^(?P<before> *)```\w*\n(?P<code>.*?)^(?P=before)```$", re.M | re.S)
WIDTH = 86  # characters of code that a page shows in a window of 1280 pixels, as seen in a browser
DOCSTRING = """Do it, as [`~peft.get_peft_model`] and [`merge_adapter_files`] do.

Args:
    rank (`int`, *optional*, defaults to `2`): How much; see docs/x.md (docs/how-to/gates.md).
    weights (`Sequence[float]` or `Mapping[str, float]`, *optional*): Which.
    record ([`Origin`]): Where from.
    images (`str`, `os.PathLike`, `PIL.Image.Image` or a list of them): What to look at.
    method (`str` or [`MergeMethod`], defaults to `"lpm"`): How.
    **options: More.

Returns:
    [`MergeOptions`] or [`~peft.PeftModel`]: All.

Example:

    ```py
    >>> 1 + 1
    2
    ```
"""
SHOWN = """Do it, as `get_peft_model` and [`merge_adapter_files`][peft_many.merge_adapter_files] do.

Args:
    rank (int): How much; see docs/x.md ([more](how-to/gates.md)).
    weights (Sequence[float] | Mapping[str, float]): Which.
    record (Origin): Where from.
    images (str | os.PathLike | PIL.Image.Image | list): What to look at.
    method (str | MergeMethod): How.
    **options: More.

Returns:
    MergeOptions | PeftModel: All.

Examples:
    >>> 1 + 1
    2"""


@pytest.mark.skipif(importlib.util.find_spec("griffe") is None, reason="the docs' tool is not installed")
def test_docstrings_are_shown_without_markup():
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "scripts" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.readable(DOCSTRING) == SHOWN


def lines_of_code(text: str) -> Iterator[str]:
    """What stands in the fences of a page or of docstrings, without the fences' indentation."""
    for found in FENCE.finditer(text):
        yield from (line.removeprefix(found["before"]) for line in found["code"].splitlines())


def test_code_is_not_wider_than_a_page():
    assert list(lines_of_code("a\n  ```py\n  x = 1\n  ```\nb")) == ["x = 1"]
    sources = [*PAGES, *(ROOT / "peft_many").rglob("*.py")]
    wide = {
        f"{path.relative_to(ROOT)}: {line}"
        for path in sources
        for line in lines_of_code(path.read_text(encoding="utf-8"))
        if len(line) > WIDTH
    }
    assert not wide
