"""What the pages of the documentation tell their readers to run: Python snippets and command lines.

A snippet that truly cannot run is marked, in the line before it, by `<!-- not run: why -->`.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "docs", "docs/how-to", "examples", "examples/ucit")
PAGES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))

_FENCE = re.compile(r"(?:<!-- not run: (?P<why>[^\n]+?) -->\n\n?)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_SHELL = ("bash", "sh", "console")
_ENDS = {"|", ">", "&&", ";"}  # of a command


@dataclass(frozen=True)
class Snippet:
    """A fenced block: its language, text, first line, section by number, and why it is not run, if so."""

    kind: str
    code: str
    line: int
    section: int
    not_run: str | None


def snippets(text: str) -> list[Snippet]:
    """All fenced blocks of a page that say what they are written in."""
    return [
        Snippet(
            found["kind"],
            found["code"],
            text.count("\n", 0, found.start("code")) + 1,
            text.count("\n## ", 0, found.start("code")),
            found["why"],
        )
        for found in _FENCE.finditer(text)
    ]


def python_snippets(path: Path) -> list[Snippet]:
    """A page's Python, in its order."""
    return [snippet for snippet in snippets(path.read_text(encoding="utf-8")) if snippet.kind == "python"]


def commands(text: str, *starts: str) -> Iterator[list[str]]:
    """The words of every command line that begins with these words, from shell blocks and in running text.

    Those with an ellipsis, brackets or a word in capitals stand for several commands, and are left out.
    """
    lines = [
        line.strip().removeprefix("$ ")
        for snippet in snippets(text)
        if snippet.kind in _SHELL
        for line in snippet.code.replace("\\\n", " ").splitlines()
    ]
    prose = _FENCE.sub("", text)
    for line in [*lines, *(found[1] for found in _INLINE.finditer(prose))]:
        command = line.partition(" #")[0]
        if not command.startswith(" ".join(starts)) or re.search(r"…|\.\.\.|\[|\b[A-Z]{2,}\b", command):
            continue
        words = shlex.split(command)
        end = next((place for place, word in enumerate(words) if word in _ENDS), len(words))
        if words[: len(starts)] == list(starts):
            yield words[:end]


def run(snippet: Snippet, page: Path, names: dict[str, object]) -> None:
    """Run one snippet; a traceback shows the lines of the page."""
    exec(compile("\n" * (snippet.line - 1) + snippet.code, str(page), "exec"), names)


def folders_written(snippet: Snippet) -> list[str]:
    """The folders that a snippet's calls want to create, and that must not exist before."""
    places = {"merge_adapter_files": 1, "pool_adapters": 1, "import_llava_checkpoint": 1}
    found = []
    for node in ast.walk(ast.parse(snippet.code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in places:
            output = node.args[places[node.func.id]]
            found += [output.value] if isinstance(output, ast.Constant) else []
    return found


def imported(snippet: Snippet) -> set[str]:
    """The packages that a snippet imports from."""
    found = set()
    for node in ast.walk(ast.parse(snippet.code)):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found
