"""Scores as the benchmarks count them."""

from __future__ import annotations

import shutil
import sys

import pytest

from tests.examples import toy

scores = toy.example("scores")


@pytest.mark.parametrize(
    ("rule", "answer", "truth", "expected"),
    [
        ("equal", "Cat", "cat", 1),
        ("equal", "a cat", "cat", 0),
        ("contained_as_word", "it is a lane.", "lane", 1),
        ("contained_as_word", "planes there", "lane", 0),
        ("contained_as_word", "Planes", "lane", 1),  # one word each: contained is enough
        ("contained_as_word", "turn left, then stop", "left.", 1),
        ("contained_as_word", "go straight ahead now", "Straight ahead", 1),
        ("contained_as_word", "Unanswerable lane", "lane", 0),
        ("contained", "The Lung tissue", "lung", 1),
        ("contained", "lun", "lung", 0),
        ("contained", "Unanswerable lung", "lung", 0),
        ("equal_letter", "a.", "A", 1),
        ("equal_letter", "Y e s", "Yes", 1),
        ("equal_letter", "A B", "A", 0),
    ],
)
def test_accuracies(rule, answer, truth, expected):
    assert getattr(scores, rule)(answer, truth, "question", "image.png") == expected


@pytest.mark.parametrize(
    ("image", "question", "answer", "truth", "expected"),
    [
        ("images/AI2D_3.png", "Which ?", "the A", "A", 0),
        ("images/TQA_3.png", "Which ?", "a", "A", 1),
        ("images/map_1.png", "Name it", "It is Ohio", "ohio", 1),
        ("images/map_1.png", "Which states are red?", "Ohio,Utah", "ohio,iowa,utah,maine", 0.5),
        ("images/map_1.png", "Which states are red?", "Unanswerable", "ohio", 0),
    ],
)
def test_science_by_its_source(image, question, answer, truth, expected):
    assert scores.listed(answer, truth, question, image) == expected


CAPTIONS = ["a red cat sits on the mat .", "two dogs play in the snow", "a man rides a brown horse"]
REFERENCES = [
    ["a red cat sits on the mat", "the cat is sitting"],
    ["two dogs are playing in deep snow", "dogs play outside"],
    ["a woman drives a car", "somebody is driving"],
]


def test_what_captions_need_is_asked_for(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pycocoevalcap", None)
        with pytest.raises(ModuleNotFoundError, match=r"peft-many\[ucit\].*--leave-out"):
            scores.caption_scores(CAPTIONS, REFERENCES)
        assert scores.caption_scores(CAPTIONS, REFERENCES, scores.CAPTION_METRICS) == {}
    with pytest.raises(ValueError, match="no caption metric 'SPICE'; there are BLEU, METEOR"):
        scores.caption_scores(CAPTIONS, REFERENCES, ["SPICE"])


def test_java_is_asked_for(monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="the extra `ucit` is not installed")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"no `java`.*Install a Java runtime"):
        scores.caption_scores(CAPTIONS, REFERENCES)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")
def test_captions():
    pytest.importorskip("pycocoevalcap", reason="the extra `ucit` is not installed")
    found = scores.caption_scores(CAPTIONS, REFERENCES)
    assert list(found) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "mean"]
    assert found["mean"] == pytest.approx(sum(list(found.values())[:7]) / 7)
    # By hand: 7 + 5 + 2 of 7 + 6 + 6 words occur in a reference, and nothing is shorter than its closest reference.
    assert found["BLEU-1"] == pytest.approx(100 * 14 / 19, abs=0.1)
    perfect = scores.caption_scores([captions[0] for captions in REFERENCES], REFERENCES, ["METEOR"])
    assert "METEOR" not in perfect
    assert "mean" not in perfect
    assert perfect["BLEU-4"] == pytest.approx(100)
    assert perfect["ROUGE-L"] == pytest.approx(100)
    assert found["CIDEr"] < perfect["CIDEr"]
    lines = scores.caption_scores(["a red\ncat\u2028sits", "", "x"], REFERENCES, ["METEOR", "CIDEr"])
    assert lines["ROUGE-L"] > 0
    with pytest.raises(ValueError, match="1 captions and 3 images"):
        scores.caption_scores(CAPTIONS[:1], REFERENCES)
