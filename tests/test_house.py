"""The house stays one that a stranger can live in: short functions, classes and files, and rooms in which all lies."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_many"
FILES = sorted(PACKAGE.glob("**/*.py"))
LONGEST = {"function": 60, "class": 200, "file": 300}
EXCUSE = re.compile(r"#.*\blong: \w+")  # on the line of the `def` or `class`, or the first of the file


def docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many lines explain a function; these make it no longer."""
    first = node.body[0]
    explained = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first.end_lineno - first.lineno + 1 if explained and isinstance(first.value.value, str) else 0


def too_long(path: Path) -> Iterator[str]:
    """What is too long in a file, without a comment that says why."""
    lines = path.read_text(encoding="utf-8").splitlines()
    parts: list[tuple[str, str, int, int]] = [("file", path.name, 1, len(lines))]
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            parts.append(("function", node.name, node.lineno, node.end_lineno - node.lineno + 1 - docstring(node)))
        elif isinstance(node, ast.ClassDef):
            parts.append(("class", node.name, node.lineno, node.end_lineno - node.lineno + 1))
    for kind, name, first, length in parts:
        if length > LONGEST[kind] and not EXCUSE.search(lines[first - 1]):
            yield f"{path.relative_to(ROOT)}:{first}: the {kind} {name} has {length} lines"


def test_nothing_is_too_long():
    found = [what for path in FILES for what in too_long(path)]
    assert not found, "\n".join(["", *found])


def test_everything_lies_in_a_room():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "metrics", "version"}
    for room in (path.parent for path in PACKAGE.glob("*/__init__.py")):
        told = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
        assert told, f"{room.name}/__init__.py does not say what lives there"


def test_the_architecture_page_names_rooms_and_files_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+/\w+\.py)`", page)
    assert len(named) > 20
    assert [name for name in named if not (PACKAGE / name).is_file()] == []
    rooms = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    assert rooms == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


@pytest.mark.parametrize(("way", "longest"), [("covariance", 12), ("projector", 10)])
def test_the_ways_are_short(way, longest):
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition(f"## The path of a {way}\n")[2].partition("\n## ")[0]
    assert 5 <= len(re.findall(r"^\d+\. `\w+/\w+\.py`", section, re.M)) <= longest


@pytest.mark.skipif(importlib.util.find_spec("importlinter") is None, reason="import-linter is not installed")
def test_imports_run_downwards():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_no_floor_is_left_out_of_the_contract():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    contract = config["importlinter:contract:floors"]
    named = set(re.findall(r"\w+", contract["layers"]))
    assert contract.getboolean("exhaustive")
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} <= named


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f():\n" + "    x = 1\n" * 60, "the function f has 61 lines"),
        ("def f():  # long: a table\n" + "    x = 1\n" * 60, None),
        ('def f():\n    """Is\n' + "    told\n" * 60 + '    """\n', None),
        ("class C:\n" + "    x = 1\n" * 200, "the class C has 201 lines"),
        ("x = 1\n" * 301, "the file m.py has 301 lines"),
        ('"""A table."""  # long: a row for each family\n' + "x = 1\n" * 300, None),
    ],
)
def test_what_is_too_long_is_found(tmp_path, monkeypatch, text, found):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "m.py").write_text(text)
    told = list(too_long(tmp_path / "m.py"))
    assert bool(told) == (found is not None)
    assert found is None or told[0].endswith(found)
