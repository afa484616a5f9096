"""The examples in the docstrings of what users call: each runs, in a folder with adapters and a merge."""

from __future__ import annotations

import doctest
import inspect
import re
import shutil
from pathlib import Path

import pytest

import peft_many
from peft_many import merge_adapter_files
from tests.adapters import base, batches, make
from tests.examples import toy
from tests.hub.llava_files import checkpoint

EXAMPLE = re.compile(r"```py\n(.*?)```", re.DOTALL)
# Classes that are not made by users, or whose example is a training run (tests/statistics).
WITHOUT = {"MAnyModel", "MergeReport", "MAnyCallback"}
PUBLIC = {
    name: thing
    for name in peft_many.__all__
    if callable(thing := getattr(peft_many, name)) and name not in WITHOUT and not name.startswith("__")
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    for seed, name in enumerate(("iconqa", "clevr", "vizwiz")):
        make(root / name, seed=seed, task_name=name)
    merge_adapter_files([root / "iconqa", root / "clevr"], root / "merged", progress=False)
    toy.save_base(root / "base")
    toy.save_image(root / "red.png", "red")
    checkpoint(root / "Task4_llava_lora")
    return root


@pytest.mark.parametrize("name", PUBLIC)
def test_the_reference_lists_it(name):
    page = Path(__file__).parents[2] / "docs" / "reference.md"
    assert f"::: peft_many.{name}\n" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name, shelf, tmp_path, monkeypatch):
    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    found = EXAMPLE.findall(inspect.getdoc(PUBLIC[name]) or "")
    assert found, f"{name} has no example"
    model = base("llava")
    world = {"base": model, "dataloader": batches(model, "llava", 0)}
    for code in found:
        test = doctest.DocTestParser().get_doctest(code, world, name, None, 0)
        told: list[str] = []
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append, clear_globs=False)
        assert not told, "".join(told)
