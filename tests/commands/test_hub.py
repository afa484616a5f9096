"""Commands on Hub ids, against the stand-in for the Hub."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from peft_many import load_routed_model, merge_adapter_files
from peft_many.commands import app
from tests.adapters import STATISTICS, WEIGHTS, base, but_operations, distance, files, logits
from tests.hub.test_sources import hub, made  # noqa: F401  (fixtures)


def run(*words: object, code: int = 0):
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done


def test_from_revisions_to_a_merge_and_back(hub, made, tmp_path):  # noqa: F811
    merged, recipe = tmp_path / "merged", tmp_path / "tasks.yaml"
    recipe.write_text("adapters: [me/one, {adapter: me/two, revision: v2, weight: 0.5}]")
    assert json.loads(run("plan", "--recipe", recipe, "--json", "-q").stdout)["problems"] == []
    run("merge", "--recipe", recipe, "-o", merged, "-q")
    options = {"weights": [1.0, 0.5], "task_names": ["one", "two"], "progress": False}
    expected = merge_adapter_files([made["one"], made["newer"]], tmp_path / "expected", **options)
    for file in (WEIGHTS, STATISTICS):
        assert files(merged)[file] == files(expected)[file]
    told = run("inspect", merged).stdout
    commit = hub.repositories["me/two"].branches["v2"]
    assert commit[:8] in told
    hub.add("me/merged", merged)
    assert json.loads(run("inspect", "me/merged", "--json").stdout)["tasks"][1]["revision"] == commit
    run("remove", "me/merged", "two", "-q", code=1)
    run("remove", "me/merged", "two", "-o", tmp_path / "left", "-q")
    alone = merge_adapter_files(["me/one"], tmp_path / "alone", progress=False)
    assert but_operations(tmp_path / "left") == but_operations(alone)
    run("add", tmp_path / "left", "me/two@v2", "--weight", "two=0.5", "-q")
    assert but_operations(tmp_path / "left") == but_operations(merged)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("me/one@v9", "has no revision 'v9'"),
        ("me/secret", "private: log in by `hf auth login`, or set HF_TOKEN"),
        ("me/gated", "is gated: ask for access"),
        ("me/pickle-only", "has no adapter_model.safetensors"),
    ],
)
def test_what_cannot_be_had_is_said(hub, tmp_path, entry, message):  # noqa: F811
    told = run("merge", entry, "-o", tmp_path / "merged", "-q", code=1).stderr
    assert message in told
    assert "Traceback" not in told
    assert message in json.loads(run("plan", entry, "--json", "-q", code=1).stdout)["problems"][0]


def test_exports_with_everything_on_the_hub(hub, made, tmp_path):  # noqa: F811
    merged = merge_adapter_files([made["one"], made["two"]], tmp_path / "merged", progress=False)
    base("llava").save_pretrained(tmp_path / "base")
    hub.add("me/base", tmp_path / "base")
    hub.add("me/merged", merged)
    run("export", "me/merged", "--format", "routed", "--base-model", "me/base", "-o", tmp_path / "routed")
    assert "base_model: me/base" in (tmp_path / "routed" / "README.md").read_text()
    hub.add("me/routed", tmp_path / "routed")
    expected = logits(PeftModel.from_pretrained(base("llava"), merged), "llava")
    assert distance(logits(load_routed_model("me/routed"), "llava"), expected) < 1e-5
    half = load_routed_model("me/routed", revision="main", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    run("export", "me/merged", "-f", "model", "--base-model", "me/base@main", "-o", tmp_path / "model")
    told = run("export", "me/merged", "-f", "model", "--base-model", "me/none", "-o", tmp_path / "2", code=1).stderr
    assert "The base model 'me/none' cannot be loaded" in told
