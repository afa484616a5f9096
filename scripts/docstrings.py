"""Shows docstrings as PEFT writes them in the words that the docs' tool knows: types, links, examples.

An extension of griffe, which reads the docstrings; mkdocs.yml names it.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import griffe

_LISTED = re.compile(r"^::: (peft_many\S*)", re.M)
_TYPE = re.compile(r"^(\s*\**\w+) \((\[?`[^\n]*?)\):", re.M)
_RESULT = re.compile(r"^(\s*)(\[?`[^`\n]+`\]?(?: or \[?`[^`\n]+`\]?)*): ", re.M)
_LINK = re.compile(r"\[`~?([\w.]+)`\](?!\()")
_EXAMPLE = re.compile(r"^Example:\n\n((?:    [^\n]*\n|\n)+?)(?=\S|\Z)", re.M)


class AsPeftWritesThem(griffe.Extension):
    """Rewrites every docstring of the package before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)


def readable(text: str) -> str:
    """A docstring without markup where the tool expects none, and with links that it can follow."""
    text = _EXAMPLE.sub(_examples, text + "\n")
    text = _TYPE.sub(lambda found: f"{found[1]} ({_plain_type(found[2])}):", text)
    text = re.sub(r"(?<=^Returns:\n)(.*)", lambda found: _RESULT.sub(_result, found[1]), text, flags=re.M)
    text = re.sub(r"\(docs/([\w/-]+)\.md\)", r"([more](\1.md))", text)
    return _LINK.sub(lambda found: _link(found[1]), text).rstrip()


def _examples(found: re.Match[str]) -> str:
    return "Examples:\n" + re.sub(r"^    ```\w*\n", "", found[1].lstrip("\n"), flags=re.M)


def _plain_type(text: str) -> str:
    """Of "`str` or `int`, *optional*, defaults to `1`" the types; the default is shown beside them anyway."""
    text = re.sub(r", defaults to .*|, \*optional\*", "", text)
    text = re.sub(r"(?<=`) or a list of them$", " | list", text)
    text = re.sub(r"(`\]?)(?:, | or )(?=\[?`)", r"\1 | ", text)
    return re.sub(r"\[`|`\]|[`~]", "", text)


def _result(found: re.Match[str]) -> str:
    short = re.sub(r"~[\w.]+\.", "", found[2])
    return f"{found[1]}{_plain_type(short)}: "


@functools.cache
def _targets() -> dict[str, str]:
    """By its last name, everything that the reference lists."""
    docs = Path(__file__).parents[1] / "docs"
    pages = "".join((docs / name).read_text(encoding="utf-8") for name in ("reference.md", "mathematics.md"))
    return {path.rpartition(".")[2]: path for path in reversed(_LISTED.findall(pages))}


def _link(name: str) -> str:
    """A link to what the reference lists; the name alone of what it does not, or of another package."""
    short = name.rpartition(".")[2]
    ours = "." not in name or name.startswith("peft_many.")
    return f"[`{short}`][{_targets()[short]}]" if ours and short in _targets() else f"`{short}`"
