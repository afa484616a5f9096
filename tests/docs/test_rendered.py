"""Docstrings as PEFT writes them, in the words of the docs' tool."""

from __future__ import annotations

import importlib.util

import pytest

from tests.docs.pages import ROOT

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
