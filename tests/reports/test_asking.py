"""`ask_merge`: the answers are the models' own, and what is said of routers and gates is what they did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from peft_many import MAnyConfig, ask_merge, measure_adapter, merge_adapter_files
from peft_many.commands import app
from peft_many.reports.asking import MERGED_LORA
from peft_many.reports.running import BASE
from tests.adapters import scatter
from tests.examples import toy

QUESTION = "What colour is it ?"
PROJECTOR = "model.multi_modal_projector"
COLOURS = {"warm": "red", "cold": "blue"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two tasks of one colour each, measured, and two merges of them, one of which chooses the LoRA too."""
    root = tmp_path_factory.mktemp("asked")
    toy.save_base(root / "base")
    for seed, (task, colour) in enumerate(COLOURS.items()):
        toy.save_image(root / f"{colour}.png", colour)
        rows = [{"image": f"{colour}.png", "question": QUESTION, "answer": colour}] * 4
        toy.write(root / f"{task}.json", rows)
        model = get_peft_model(load(root), MAnyConfig(r=2, task_name=task))
        scatter(model, seed)
        model.save_pretrained(root / f"{task}-trained")
        measure_adapter(root / f"{task}-trained", root / f"{task}.json", root / task, progress=False)
    for name, options in {"merged": {}, "gated": {"gate_lora": True}}.items():
        merge_adapter_files([root / task for task in COLOURS], root / name, **options, progress=False)
    return root


def load(root: Path):
    return AutoModelForImageTextToText.from_pretrained(root / "base")


def said(model, root: Path, colour: str) -> str:
    processor = AutoProcessor.from_pretrained(root / "base")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(images=[Image.open(root / f"{colour}.png")], text=[text], return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)
    return processor.tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("merge", ["merged", "gated"])
def test_everybody_says_what_they_say_by_themselves(place, merge):
    found = ask_merge(place / merge, QUESTION, place / "red.png", compare=True, max_new_tokens=8)
    assert found.answer == said(PeftModel.from_pretrained(load(place), place / merge), place, "red")
    assert found.others == {
        BASE: said(load(place), place, "red"),
        **{
            f"{task} alone": said(PeftModel.from_pretrained(load(place), place / task), place, "red")
            for task in ("cold", "warm")
        },
    }
    assert len({found.answer, *found.others.values()}) > 2, "else nothing is told apart"


def test_where_an_image_goes_is_told(place):
    options = {"max_new_tokens": 1}
    red = ask_merge(place / "gated", QUESTION, place / "red.png", **options)
    assert red.routing[PROJECTOR]["warm"] > 0.9
    assert red.gate["warm"] > 0.9
    assert sum(red.gate.values()) == pytest.approx(1, abs=1e-5)
    assert red.others == {}
    blue = ask_merge(place / "merged", QUESTION, Image.open(place / "blue.png"), **options)
    assert blue.routing[PROJECTOR]["cold"] > 0.9
    assert blue.gate == {}
    words = ask_merge(place / "gated", QUESTION, **options)
    assert words.routing == {}
    assert words.gate == {"cold": 0, "warm": 0, MERGED_LORA: 1}


def test_one_tasks_adapter_is_asked_too(place):
    found = ask_merge(place / "warm", QUESTION, [place / "red.png"], compare=True, max_new_tokens=8)
    assert found.answer == said(PeftModel.from_pretrained(load(place), place / "warm"), place, "red")
    assert (found.routing, found.gate, list(found.others)) == ({}, {}, [BASE])


def test_options_of_the_model(place):
    options = {"dtype": torch.bfloat16}
    found = ask_merge(place / "merged", QUESTION, place / "red.png", model_options=options, max_new_tokens=2)
    assert found.routing[PROJECTOR]["warm"] > 0.9


def test_an_image_that_is_missing_shows_before_a_model_is_loaded(place, monkeypatch):
    monkeypatch.setattr("peft_many.reports.running.RunningMerge.load", None)
    with pytest.raises(ValueError, match=r"'nowhere\.png' cannot be read: there is no such file"):
        ask_merge(place / "merged", QUESTION, "nowhere.png")


def test_the_command(place):
    words = ["ask", str(place / "gated"), QUESTION, "--image", str(place / "red.png"), "--max-new-tokens", "8"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    found = ask_merge(place / "gated", QUESTION, place / "red.png", compare=True, max_new_tokens=8)
    lines = told.stdout.splitlines()
    assert lines[0] == found.answer
    assert found.cut_short
    assert lines[1] == "• The answer ran to the limit of its tokens (--max-new-tokens)"
    assert lines[2].startswith("• Images went through the projectors of: warm ")
    assert lines[3].startswith("• The LoRA was that of: warm ")
    told = json.loads(CliRunner().invoke(app, [*words, "--compare", "--json"]).stdout)
    assert told["others"] == found.others
    assert "• There was no image to route (--image)" in CliRunner().invoke(app, words[:3]).stdout.splitlines()
    told = CliRunner().invoke(app, [*words, "--compare"]).stdout
    assert f"• {BASE}: {found.others[BASE]}" in told
