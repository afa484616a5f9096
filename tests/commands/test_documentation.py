"""docs/command-line.md says what the commands' own help says, and its commands are called rightly."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from peft_many import read_recipe
from peft_many.commands import app

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "peft_many"
PAGE = ROOT / "docs" / "command-line.md"
DOCS = ROOT / "docs"
TOLD = [PAGE, ROOT / "README.md", DOCS / "mini-ucit.md", DOCS / "index.md", *sorted(DOCS.glob("how-to/*.md"))]


def script():
    spec = importlib.util.spec_from_file_location("document_commands", ROOT / "scripts" / "document_commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == script().documented(), "run python scripts/document_commands.py"


def test_the_options_of_merging_are_up_to_date():
    listed = PACKAGE / "commands" / "merge_options.json"
    assert listed.read_text(encoding="utf-8") == script().listed(), "run python scripts/document_commands.py"


def calls():
    for page in TOLD:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["peft-many"] and words[1][0].isalpha():
                    yield pytest.param(words[1:], id=f"{page.name}: {' '.join(words)}")


@pytest.mark.parametrize("words", list(calls()))
def test_every_documented_call_is_understood(words):
    group = typer.main.get_command(app)
    command = group.commands[words[0]]
    context = command.make_context(words[0], list(words[1:]), resilient_parsing=False)
    assert context.args == []


def test_the_documented_recipe_is_one(tmp_path):
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    arguments = read_recipe(tmp_path / "recipe.yaml")
    assert arguments["adapters"] == ["me/iconqa@v2", "clevr", "me/charts@main"]
    assert arguments["rank"] == 64
