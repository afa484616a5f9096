"""A merge in one line, by everything that loads adapters: each answers as the merge does that was put on its base."""

from __future__ import annotations

import pytest
from peft import AutoPeftModel, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from tests.reports.test_asking import QUESTION, load, place, said  # noqa: F401  (a fixture)


def by_transformers_method(root, merge):
    base = load(root)
    base.load_adapter(str(merge))
    return base


@pytest.mark.parametrize(
    "one_line",
    [
        lambda root, merge: AutoPeftModel.from_pretrained(merge),
        lambda root, merge: AutoModelForImageTextToText.from_pretrained(merge),
        by_transformers_method,
    ],
    ids=["AutoPeftModel", "AutoModelForImageTextToText", "load_adapter"],
)
@pytest.mark.parametrize("merge", ["merged", "gated", "warm"])
def test_models(place, merge, one_line):  # noqa: F811
    expected = PeftModel.from_pretrained(load(place), place / merge)
    found = one_line(place, place / merge)
    for colour in ("red", "blue"):
        assert said(found, place, colour) == said(expected, place, colour)


def test_pipeline(place):  # noqa: F811
    ask = pipeline(
        "image-text-to-text",
        model=str(place / "gated"),
        processor=AutoProcessor.from_pretrained(place / "base"),
        device="cpu",
    )
    expected = PeftModel.from_pretrained(load(place), place / "gated")
    for colour in ("red", "blue"):
        content = [{"type": "image", "image": str(place / f"{colour}.png")}, {"type": "text", "text": QUESTION}]
        told = ask(text=[{"role": "user", "content": content}], max_new_tokens=8, return_full_text=False)
        assert told[0]["generated_text"].strip() == said(expected, place, colour)
