"""The notebook about three adapters: it is the script's text, and that runs, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import matplotlib
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

import peft_many
from peft_many import MAnyConfig
from peft_many.reports.evaluation import Evaluation
from tests.examples.scripts import EXAMPLES, script, write_toy

TASKS = ("charts", "scenes", "icons")
LAYERS = r".*language_model.*(q_proj|v_proj|up_proj)"


@pytest.fixture(scope="module")
def maker():
    path = Path(__file__).parents[2] / "scripts" / "make_notebook.py"
    spec = importlib.util.spec_from_file_location("make_notebook", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"), examples=12)


def train(toy: Path, task: str, config: LoraConfig, folder: Path) -> Path:
    """A few steps of plain LoRA."""
    data = script("question_data")
    torch.manual_seed(0)
    rows, model = data.Questions(toy / f"{task}.jsonl"), AutoModelForImageTextToText.from_pretrained(toy / "model")
    model = get_peft_model(model, config)
    batch = data.Collator(AutoProcessor.from_pretrained(toy / "model"))(list(rows))
    optimizer = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=5e-3)
    for _ in range(12):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / task)
    return folder / task


def run(maker, toy: Path, adapters: dict[str, Path]) -> dict:
    """The code cells one after another, with the toy in place of the reader's settings."""
    settings = {
        "BASE": str(toy / "model"),
        "ADAPTERS": adapters,
        "TRAINING": {task: toy / f"{task}.jsonl" for task in TASKS},
        "TEST": {task: toy / f"{task}-test.jsonl" for task in TASKS},
        "IMAGE": toy / "charts" / "1.png",
        "QUESTION": "which bar is highest ?",
    }
    namespace: dict = dict(settings)
    replaced = []
    for kind, text in maker.cells(maker.SCRIPT.read_text(encoding="utf-8")):
        if kind == "code" and not text.startswith("%pip"):
            if text.startswith("BASE = "):
                replaced.append({line.split(" = ")[0] for line in text.splitlines()})
                continue
            exec(compile(text, "<cell>", "exec"), namespace)
    assert replaced == [{"BASE", "ADAPTERS", "TRAINING", "TEST", "IMAGE, QUESTION"}]
    return namespace


def test_the_notebook_is_the_script(maker):
    text = maker.SCRIPT.read_text(encoding="utf-8")
    assert maker.NOTEBOOK.read_text(encoding="utf-8") == maker.notebook(text), "run python scripts/make_notebook.py"
    content = json.loads(maker.NOTEBOOK.read_text(encoding="utf-8"))
    first = next(cell for cell in content["cells"] if cell["cell_type"] == "code")
    assert "".join(first["source"]).startswith('%pip install -q "peft-many[')
    assert "merge_three_adapters.ipynb" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_three_plain_loras(maker, toy, tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, base_model_name_or_path=str(toy / "model"))
    found = run(maker, toy, {task: train(toy, task, config, tmp_path / "trained") for task in TASKS})
    assert (tmp_path / "routing.png").stat().st_size > 1000
    assert PeftConfig.from_pretrained("merged").merge.names == sorted(TASKS)
    assert found["said"].gate.keys() == {*TASKS, "merged LoRA"}
    assert found["scores"].keys() == {
        "merge", "merge, one LoRA", "base model", "add_weighted_adapter", *(f"{task} alone" for task in TASKS)
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "merge: " in said
    assert "add_weighted_adapter" in said


def test_adapters_with_projectors_which_peft_does_not_average(maker, toy, tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    scored = Evaluation({}, {}, {name: {} for name in ("merge", "base model")})
    monkeypatch.setattr(peft_many, "evaluate_merge", lambda *args, **options: scored)  # the other test does it
    config = MAnyConfig(r=4, lora_alpha=8)
    found = run(maker, toy, {task: train(toy, task, config, tmp_path / "trained") for task in TASKS})
    assert "add_weighted_adapter" not in found["scores"]
    assert "Cannot add weighted adapters" in capsys.readouterr().out
