"""The routing viewer: as data, and as a page in a headless browser where there is one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import typer.testing
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from peft_many import MAnyConfig, merge_adapter_sequence
from peft_many.reports import viewer
from peft_many.reports.image_map import map_images
from tests.examples.scripts import script, training_arguments, write_toy

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROJECTOR = "model.multi_modal_projector"
QUESTIONS = {"charts": "which bar is highest ?", "scenes": "what is shown ?"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A tiny model, and two adapters that answer in ways the model itself does not."""
    folder = write_toy(tmp_path_factory.mktemp("toy"), examples=128)
    fast = [
        "--learning-rate",
        "4e-3",
        "--batch-size",
        "16",
        "--epochs",
        "4",
        "--rank",
        "8",
        "--samples",
        "32",
        "--cpu",
    ]
    for task in QUESTIONS:
        script("train_with_trainer").main(training_arguments(folder, task, folder / f"{task}-adapter", fast))
    return folder


def merge(toy: Path, **options: Any) -> PeftModel:
    base = AutoModelForImageTextToText.from_pretrained(toy / "model")
    return merge_adapter_sequence(base, [toy / f"{task}-adapter" for task in QUESTIONS], progress=False, **options)


@pytest.fixture(scope="module")
def merged(toy) -> PeftModel:
    return merge(toy)


@pytest.fixture(scope="module")
def processor(toy) -> Any:
    return AutoProcessor.from_pretrained(toy / "model")


def answer(model: Any, processor: Any, image: Image.Image, question: str) -> str:
    text = script("question_data").prompt(processor, question)
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("task", list(QUESTIONS))
def test_a_comparison_is_what_one_would_see_by_hand(toy, merged, processor, task):
    image, question = Image.open(toy / task / "3.png"), QUESTIONS[task]
    flags = [parameter.requires_grad for parameter in merged.parameters()]
    found = viewer.compare(merged, processor, image, question, max_new_tokens=16)
    assert found.weights == viewer.resembles(merged, processor, image)
    weights = found.weights[PROJECTOR]
    assert sorted(weights) == sorted(QUESTIONS)
    assert weights[task] > 0.9
    assert sum(weights.values()) == pytest.approx(1)

    assert found.routed == answer(merged, processor, image, question)
    assert found.base_model == answer(
        AutoModelForImageTextToText.from_pretrained(toy / "model"), processor, image, question
    )
    plain = merge(toy)
    plain.base_model.model.model.multi_modal_projector = AutoModelForImageTextToText.from_pretrained(
        toy / "model"
    ).model.multi_modal_projector
    assert found.base_projector == answer(plain, processor, image, question)
    assert len({found.routed, found.base_model}) == 2, "the adapters have learned to answer otherwise"
    assert [parameter.requires_grad for parameter in merged.parameters()] == flags
    assert not merged.training
    assert answer(merged, processor, image, question) == found.routed, "nothing is left behind"


def test_images_like_no_tasks(toy, processor):
    merged = merge(toy, router="gaussian", abstain_above=4.0)
    noise = torch.randint(0, 256, (48, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen = viewer.resembles(merged, processor, Image.fromarray(noise.numpy()))[PROJECTOR]
    assert seen == {"charts": 0.0, "scenes": 0.0, viewer.NO_TASK: 1.0}
    known = viewer.resembles(merged, processor, Image.open(toy / "charts" / "5.png"))[PROJECTOR]
    assert known["charts"] > 0.9


def test_what_cannot_be_viewed_is_said(toy, merged, processor):
    image = Image.new("RGB", (48, 48))
    base = AutoModelForImageTextToText.from_pretrained(toy / "model")
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration"):
        viewer.compare(base, processor, image, "?")
    task = get_peft_model(base, MAnyConfig(r=2))
    with pytest.raises(ValueError, match="'default' routes no projector: it is no merge"):
        viewer.compare(task, processor, image, "?")
    bare = AutoProcessor.from_pretrained(toy / "model")
    bare.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        viewer.resembles(merged, bare, image)


def test_many_images_are_seen_as_one_by_one(toy, merged, processor):
    files = [toy / task / f"{i}.png" for task in QUESTIONS for i in range(2)]
    (found,) = map_images(merged, processor, files, progress=False).values()
    assert found.belongs() == [task for task in QUESTIONS for _ in range(2)]
    for weights, file in zip(found.weights(), files):
        alone = viewer.resembles(merged, processor, Image.open(file))[PROJECTOR]
        assert dict(zip(found.tasks, weights.tolist())) == pytest.approx(alone, abs=1e-5)
    with pytest.raises(ValueError, match="no images to look at"):
        map_images(merged, processor, [])


def test_without_gradio_the_page_says_what_to_install(merged, processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r'gradio: pip install "peft-many\[viewer\]"'):
        viewer.launch(merged, processor)


def test_from_the_command_line(toy, merged, processor, tmp_path, monkeypatch):
    app = typer.Typer()
    app.command()(viewer.main)
    runner = typer.testing.CliRunner()
    assert "which tasks a merge takes an image for" in " ".join(runner.invoke(app, ["--help"]).output.split())
    merged.save_pretrained(tmp_path / "merged")
    shown: list[dict[str, Any]] = []

    def launch(model: Any, processor: Any, **options: Any) -> None:
        shown.append({"seen": viewer.resembles(model, processor, picture), **options})

    picture = Image.open(toy / "charts" / "1.png")
    monkeypatch.setattr(viewer, "launch", launch)
    done = runner.invoke(app, [str(toy / "model"), str(tmp_path / "merged"), "--port", "7000"])
    assert done.exit_code == 0, done.output
    seen = viewer.resembles(merged, processor, picture)
    assert shown == [{"seen": seen, "max_new_tokens": 64, "server_port": 7000}]


# ---------------------------------------------------------------------------------------------------------- the page


@pytest.fixture
def address(merged, processor):
    pytest.importorskip("gradio", reason="the extra `viewer` is not installed")
    page = viewer.build(merged, processor, max_new_tokens=16)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield url
    page.close()


def test_the_page_by_its_own_client(toy, merged, processor, address):
    client = pytest.importorskip("gradio_client")
    picture = toy / "scenes" / "2.png"
    seen = client.Client(address, verbose=False)
    weights, *answers = seen.predict(client.handle_file(picture), QUESTIONS["scenes"], api_name="/ask")
    found = viewer.compare(merged, processor, Image.open(picture), QUESTIONS["scenes"], max_new_tokens=16)
    assert weights["label"] == "scenes"
    assert answers == [found.routed, found.base_projector, found.base_model]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome")
def test_the_page_in_a_browser(toy, merged, processor, address):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        for task, question in QUESTIONS.items():
            if task != next(iter(QUESTIONS)):
                page.get_by_label("Remove Image").click()
            picture = toy / task / "2.png"
            page.locator("#image input[type=file]").set_input_files(str(picture))
            sync_api.expect(page.locator("#weights-0")).to_contain_text(task, timeout=60_000)
            page.locator("#question textarea").fill(question)
            page.locator("#ask").click()
            found = viewer.compare(merged, processor, Image.open(picture), question, max_new_tokens=16)
            shown = {"routed": found.routed, "base-projector": found.base_projector, "base-model": found.base_model}
            for place, text in shown.items():
                sync_api.expect(page.locator(f"#{place} textarea")).to_have_value(text, timeout=60_000)
        page.get_by_role("tab", name="Many images").click()
        pictures = [toy / task / f"{i}.png" for task in QUESTIONS for i in range(3)]
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Or choose images").click()
        chooser.value.set_files([str(file) for file in pictures])
        table = page.locator("#table")
        for picture in {file.name for file in pictures}:
            sync_api.expect(table).to_contain_text(picture, timeout=60_000)
        page.locator("#question-of-all textarea").fill(QUESTIONS["scenes"])
        page.locator("#ask-all").click()
        found = viewer.compare(merged, processor, Image.open(pictures[-1]), QUESTIONS["scenes"], max_new_tokens=16)
        sync_api.expect(table).to_contain_text(found.routed, timeout=60_000)
        assert not errors
        browser.close()
