"""The house stays one that a stranger can live in: short functions, classes and files, and rooms in which all lies."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files
from peft_many.algebra.covariance import Covariance
from peft_many.algebra.sketch import CovarianceAccumulator, CovarianceSketch
from peft_many.files.statistics import InputStatistics
from peft_many.tuner.layers import lora_layers
from tests import adapters

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


def path_of(what: str) -> str:
    """What the architecture page says of a path."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return page.partition(f"## The path of {what}\n")[2].partition("\n## ")[0]


def steps(text: str, mark: str = r"\d+\.") -> list[str]:
    """The files of a list."""
    return re.findall(rf"^{mark} `(\w+/\w+\.py)`", text, re.M)


@pytest.mark.parametrize(("what", "longest"), [("a covariance", 12), ("a projector", 26)])
def test_the_paths_grow_no_longer(what, longest):
    """For a projector ten were aimed at; the page says so."""
    found = steps(path_of(what))
    assert 5 <= len({*found}) <= longest


@contextmanager
def files_that_run(holds: Callable[[Any], bool] | None = None) -> Iterator[set[str]]:
    """The package's files, a function of which runs meanwhile, or runs and holds such an object."""
    found: set[str] = set()
    inside = f"{PACKAGE}{os.sep}"

    def look(frame: FrameType, event: str, given: Any) -> None:
        name = frame.f_code.co_filename
        if event != "return" or not name.startswith(inside):
            return
        if holds is None or any(map(holds, (given, *frame.f_locals.values()))):
            found.add(name.removeprefix(inside).replace(os.sep, "/"))

    before = sys.getprofile()
    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


def holds_covariance(value: Any) -> bool:
    """Whether it is the covariance of an input, or the running sum that it is made of, or holds one."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    kinds = (Covariance, CovarianceAccumulator, CovarianceSketch, InputStatistics)
    return any(isinstance(part, kinds) for part in parts)


def two_tasks(folder: Path, family: str, batches: Callable[[int], list[dict[str, torch.Tensor]]]) -> list[Path]:
    """Two measured adapters."""
    config = {"r": 2, "target_modules": r".*layers\.0.*(q_proj|up_proj)"}
    for seed, name in enumerate("ab"):
        model = get_peft_model(adapters.base(family), MAnyConfig(**config, task_name=name))
        adapters.scatter(model, seed)
        collect_statistics(model, batches(seed), rank=4, progress=False)
        model.save_pretrained(folder / name)
    return [folder / name for name in "ab"]


def test_the_path_of_a_covariance_is_the_one_on_the_page(tmp_path):
    """Inputs that are no token ids: no instructions are read, whose features have covariances too."""
    width = adapters.base("llama").config.hidden_size

    def batches(seed: int) -> list[dict[str, torch.Tensor]]:
        return [{"inputs_embeds": torch.randn(2, 20, width, generator=torch.Generator().manual_seed(seed))}]

    with files_that_run(holds_covariance) as found:
        merge_adapter_files(two_tasks(tmp_path, "llama", batches), tmp_path / "merge", progress=False)
        merged = PeftModel.from_pretrained(adapters.base("llama"), tmp_path / "merge")
        assert all(layer.covariance["default"].trace > 0 for layer in lora_layers(merged, "default").values())
    page = path_of("a covariance")
    assert found == {*steps(page), *steps(page, "-")}


def test_the_path_of_an_image_is_the_one_on_the_page(tmp_path):
    base = adapters.base("llava")
    tasks = two_tasks(tmp_path, "llava", lambda seed: adapters.batches(base, "llava", seed, rows=2))
    merge_adapter_files(tasks, tmp_path / "merge", progress=False)
    merged = PeftModel.from_pretrained(base, tmp_path / "merge").eval()
    projector, running, found = merged.get_submodule(f"base_model.model.{adapters.PROJECTOR}"), ExitStack(), []
    projector.register_forward_pre_hook(lambda *_: found.append(running.enter_context(files_that_run())))
    projector.register_forward_hook(lambda *_: running.close())
    with running, torch.no_grad():
        merged(**adapters.batches(base, "llava", 0, rows=2)[0])
    assert found == [{*steps(path_of("a projector").partition("\nAn image, ")[2])}]


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
