"""What is expected of a merge's routing, in words and as JSON."""

import pytest

from peft_many.records import GATES, ExpectedRouting, MergeOptions, MergeRecord, Origin, TaskRecord, most_telling


def routing(matrix, by="both", undecided=None):
    names = "abcdefgh"[: len(matrix)]
    return ExpectedRouting(by, {name: dict(zip(names, row)) for name, row in zip(names, matrix)}, undecided or {})


def test_pairs_that_cannot_be_told_apart_are_named():
    found = routing([[0.52, 0.48, 0.0], [0.48, 0.52, 0.0], [0.0, 0.0, 1.0]])
    assert found.accuracy == pytest.approx(0.68)
    assert found.in_words(GATES) == [
        "Expected choice of the LoRA, by images and instructions: 68 % of the inputs get their own task's "
        "(mean over 3 tasks).",
        "'a' and 'b' are hard to tell apart by images and instructions: each takes 48 % of the other's inputs.",
    ]
    one_way = routing([[0.98, 0.02], [0.3, 0.7]], by="images")
    assert one_way.in_words("p") == [
        "Expected routing of images at 'p': 84 % go to their own task (mean over 2 tasks).",
        "'a' and 'b' look alike: 'a' takes 30 % of the images of 'b', and 'b' 2 % of those of 'a'.",
    ]


def test_a_pair_that_goes_one_way_is_told_of_once():
    assert routing([[1.0, 0.0], [0.3, 0.7]], by="instructions").doubts(GATES) == [
        "'a' and 'b' ask alike: 'a' takes 30 % of the inputs of 'b'."
    ]


def test_what_says_the_same_is_not_said_twice():
    images, words = routing([[1.0]], by="images"), routing([[1.0]], by="instructions")
    assert list(most_telling({"p": images, "q": images})) == ["q"]
    assert list(most_telling({GATES: words, "p": images, "q": images})) == ["q", GATES]
    assert list(most_telling({GATES: images, "q": images})) == [GATES]


def test_tasks_that_get_what_others_do_not_are_not_named():
    assert routing([[0.95, 0.05], [0.05, 0.95]]).look_alikes() == []
    assert routing([[0.02, 0.01, 0.97], [0.0, 1.0, 0.0], [0.9, 0.0, 0.1]]).look_alikes() == [("a", "c")]


def test_of_many_tasks_that_are_the_same_some_are_named():
    found = routing([[0.125] * 8] * 8, undecided=dict.fromkeys("abcdefgh", 1.0))
    lines = found.doubts(GATES)
    assert len(found.look_alikes()) == 28
    assert len(lines) == 7
    assert lines[5] == "23 more pairs of tasks are hard to tell apart."
    assert lines[6].startswith("Inputs that no task has half of the weight of get the merged LoRA: 100 % of 'a', ")
    assert routing([[1.0]]).in_words(GATES) == []


def test_a_config_keeps_what_counts():
    found = routing([[0.9912345, 0.0087655], [0.25, 0.75]], undecided={"a": 0.004, "b": 0.5})
    assert found.kept() == ExpectedRouting("both", {"a": {"a": 0.991}, "b": {"a": 0.25, "b": 0.75}}, {"b": 0.5})
    tasks = [TaskRecord(name, 1.0, Origin("0")) for name in "ab"]
    merge = MergeRecord(MergeOptions().filled_in([]), tasks, expected_routing={"p": found.kept()})
    assert MergeRecord.read(merge.to_json()) == merge


@pytest.mark.parametrize(
    "change",
    [
        {"by": "magic"},
        {"shares": {"a": 1.0}},
        {"shares": {"a": {"x": 1.0}}},
        {"shares": {"x": {}}},
        {"shares": {"a": {"a": "1"}}},
        {"undecided": {"b": 1.0}},
    ],
)
def test_nonsense_in_a_config_is_refused(change):
    tasks = [{"name": "a", "weight": 1.0, "origin": {"sha256": "0"}}]
    expected = {"by": "images", "shares": {"a": {"a": 1.0}}, "undecided": {}, **change}
    content = {"options": MergeOptions().filled_in([]).describe(), "tasks": tasks, "expected_routing": {"p": expected}}
    with pytest.raises((ValueError, TypeError)):
        MergeRecord.read(content)
