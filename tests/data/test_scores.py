"""What counts as right."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from peft_many.data.conversations import Example
from peft_many.data.scores import check_metric, exact, score, vqa, vqa_words


def truth(*right: str) -> Example:
    return Example((), right[0], (), right if len(right) > 1 else ())


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("Red.", ["red"], 1),
        ("  light  blue ", ["Light blue"], 1),
        ("a red", ["red"], 0),
        ("b", ["a", "b"], 1),
        ("", ["red"], 0),
    ],
)
def test_exact(answer, right, expected):
    assert exact(answer, truth(*right)) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Cat.", "cat"),
        ("two dogs, and a bird!", "2 dogs and bird"),
        ("1,000.5", "1000.5"),
        ("isn't it?", "isnt it"),
        ("none", "0"),
        ("left/right", "left right"),
    ],
)
def test_words_of_vqa(text, words):
    assert vqa_words(text) == words


def test_vqa_asks_ten_people():
    said = ["yes"] * 2 + ["no"] * 8
    assert vqa("No", truth(*said)) == 1
    assert vqa("yes", truth(*said)) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)  # as VQA's own code gives
    assert vqa("maybe", truth(*said)) == 0
    assert vqa("a two", truth("2")) == 1


def test_a_score_is_the_mean_in_per_cent():
    assert score("exact", ["red", "red"], [truth("red"), truth("blue")]) == 50
    with pytest.raises(ValueError, match="There is no metric 'bleu'; there are exact, vqa, captions"):
        check_metric("bleu")


def test_captions_say_what_they_lack(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ModuleNotFoundError, match=r"not installed: `pip install 'peft-many\[ucit\]'`\.$"):
        check_metric("captions")


def test_captions_are_tried_before_hours_of_generation(monkeypatch):
    class Tokenizer:
        def tokenize(self, captions):
            raise PermissionError("the folder cannot be written to")

    for name in ("pycocoevalcap", "pycocoevalcap.tokenizer", "pycocoevalcap.tokenizer.ptbtokenizer"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(PTBTokenizer=Tokenizer))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(OSError, match=r"cannot split captions into words: the folder cannot be written to\. It runs"):
        check_metric("captions")
