"""`peft-many measure`: the function, from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_many import inspect_adapter, measure_adapter
from peft_many.commands import app
from peft_many.commands.arguments import model_options
from tests.adapters import files
from tests.statistics.test_from_data import place  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]


def run(*words: object, code: int = 0):
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done


def test_it_is_measure_adapter(place, tmp_path):  # noqa: F811
    words = ["measure", place / "plain", "--data", place / "colours.json", "--name", "colours", "--samples", 6]
    told = run(*words, "--seed", 1, "--keep-prompts", 2, "--output", tmp_path / "1")
    assert told.stdout == f"The measured adapter: {tmp_path / '1'}\n"
    measure_adapter(
        place / "plain",
        place / "colours.json",
        tmp_path / "2",
        task_name="colours",
        max_samples=6,
        seed=1,
        statistics_options={"keep_prompts": 2},
        progress=False,
    )
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert [task.prompts for task in inspect_adapter(tmp_path / "1").tasks] == [2]
    assert "not empty" in run(*words, "--output", tmp_path / "1", code=1).stderr
    assert "There is no file" in run(*words[:2], "--data", "none.jsonl", "-o", tmp_path / "3", code=1).stderr


def test_quiet_shows_no_bar_of_any_library(place, tmp_path):  # noqa: F811
    bars = {}
    environment = {name: value for name, value in os.environ.items() if not name.endswith("DISABLE_PROGRESS_BARS")}
    for quiet in ([], ["-q"]):
        program = ["-c", "from peft_many_command import main; main()"]
        words = ["measure", place / "plain", "--data", place / "colours.json", "-o", tmp_path / f"{quiet}", *quiet]
        done = subprocess.run(
            [sys.executable, *program, *map(str, words)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        bars[bool(quiet)] = "it/s" in done.stderr, "Measuring" in done.stderr
    assert bars == {False: (True, True), True: (False, False)}


def test_bits():
    pytest.importorskip("bitsandbytes")
    assert model_options(None) == {}
    assert model_options("4bit")["quantization_config"].load_in_4bit
    assert model_options("8bit")["quantization_config"].load_in_8bit


def test_a_dtype():
    assert model_options("float32") == {"dtype": "float32"}


def test_a_split_of_a_file_is_refused(place, tmp_path):  # noqa: F811
    for words in (
        ["measure", place / "plain", "--data", place / "colours.json", "-o", tmp_path / "1"],
        ["evaluate", place / "plain", "--data", f"a={place / 'colours.json'}"],
        ["refit", place / "plain", "-o", tmp_path / "1"],
    ):
        done = CliRunner().invoke(app, [*map(str, words), "--split", "validation"])
        assert done.exit_code == 2
        told = done.stderr
        assert "There is no data set to read a split of" in " ".join(told.replace("│", " ").split())
    assert not (tmp_path / "1").exists()
