"""Help and wrong usage import neither torch nor PEFT; a command that does its work registers the type first."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import peft_many_command
from tests.adapters import make

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from peft_many_command import main

def call(*words, code=0):
    sys.argv = ["peft-many", *words]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == code, (words, ended.code)

call("--version")
call("--help")
import typer, peft_many.commands
for name in typer.main.get_command(peft_many.commands.app).commands:
    call(name, "--help")
call("merge", "a", "--output", "b", "--nonsense", code=2)
loaded = {"accelerate", "numpy", "peft", "safetensors", "torch", "transformers"} & sys.modules.keys()
assert not loaded, loaded
print("no", "PEFT", "yet")
call("inspect", ADAPTER)
import peft
assert peft.PeftConfig.from_pretrained(ADAPTER).__class__ is peft_many.MAnyConfig
"""


def test_help_imports_no_torch_and_a_command_registers_the_type(tmp_path):
    adapter = make(tmp_path / "a", seed=1, task_name="charts").folder
    program = PROGRAM.replace("ADAPTER", repr(str(adapter)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    before, _, after = done.stdout.partition("no PEFT yet")
    assert before.count("Usage: peft-many") > 10
    assert "the adapter of one task (MANY)" in after


def test_the_command_is_what_is_installed():
    packaging = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (place,) = re.findall(r'\[project\.scripts]\npeft-many = "(.+)"\n', packaging)
    assert importlib.metadata.EntryPoint("peft-many", place, "console_scripts").load() is peft_many_command.main
    assert f'py-modules = ["{peft_many_command.__name__}"]' in packaging
