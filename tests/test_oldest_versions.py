"""`.ci/drift oldest` installs the lower ends of the ranges in pyproject.toml."""

import importlib.util
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("oldest_versions", ROOT / "scripts" / "oldest_versions.py")
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

PROJECT = {
    "name": "ours",
    "optional-dependencies": {"plots": ["matplotlib>=3.8"], "test": ["ours[plots]", "pytest>=8,<10"]},
}


def test_extras_stand_for_what_they_require():
    found = script.requirements(PROJECT, ["torch>=2.7", "ours[test]"])
    assert [script.lowest(requirement) for requirement in found] == ["torch==2.7", "matplotlib==3.8", "pytest==8"]


def test_markers_are_kept():
    assert script.lowest(Requirement("trl>=1.16; python_version >= '3.11'")) == 'trl==1.16; python_version >= "3.11"'


@pytest.mark.parametrize("line", ["torch", "torch<3"])
def test_a_range_without_a_lower_end_is_an_error(line):
    with pytest.raises(ValueError, match="needs a lower bound"):
        script.lowest(Requirement(line))


def test_our_ranges_have_lower_ends(capsys, monkeypatch):
    monkeypatch.setattr(script.sys, "argv", ["oldest_versions.py", "demo", "test"])
    script.main()
    pins = {pin.name: pin for pin in map(Requirement, capsys.readouterr().out.splitlines())}
    assert {"torch", "transformers", "peft", "accelerate", "matplotlib", "gradio", "pytest"} <= set(pins)
    assert str(pins["peft"].specifier).removeprefix("==") in script.PYPROJECT.read_text()
