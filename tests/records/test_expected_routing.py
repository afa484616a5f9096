"""What is expected of a merge's routing, in words and as JSON."""

import pytest

from peft_many.records import GATES, ExpectedRouting, MergeOptions, MergeRecord, Origin, TaskRecord, most_telling


def routing(matrix, by="both", **left):
    names = "abcdefgh"[: len(matrix)]
    return ExpectedRouting(by, {name: dict(zip(names, row)) for name, row in zip(names, matrix)}, **left)


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
    assert list(most_telling({GATES: words, "p": words, "q": words})) == [GATES]


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


def test_what_no_task_gets_is_told_of():
    left = {"undecided": {"a": 0.2, "b": 0.01}, "like_none": {"b": 0.6}}
    assert routing([[0.8, 0.0], [0.0, 0.39]], **left).doubts(GATES) == [
        "Inputs that no task has half of the weight of get the merged LoRA: 20 % of 'a'.",
        "Inputs that are like no task's are left to the base model: 60 % of 'b'.",
    ]
    for by, told in (("images", ["Images", ""]), ("instructions", ["Images of inputs", ", by instructions"])):
        assert routing([[1.0, 0.0], [0.0, 0.4]], by=by, like_none={"b": 0.6}).in_words("p") == [
            f"Expected routing of images at 'p'{told[1]}: 70 % go to their own task (mean over 2 tasks).",
            f"{told[0]} that are like no task's pass the base model's projector: 60 % of 'b'.",
        ]


def test_a_config_keeps_what_counts():
    found = routing([[0.9912345, 0.0087655], [0.25, 0.7]], undecided={"a": 0.004, "b": 0.5}, like_none={"b": 0.05})
    shares = {"a": {"a": 0.991}, "b": {"a": 0.25, "b": 0.7}}
    assert found.kept() == ExpectedRouting("both", shares, {"b": 0.5}, {"b": 0.05})
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
        {"like_none": {"b": 1.0}},
        {"like_none": {"a": "1"}},
    ],
)
def test_nonsense_in_a_config_is_refused(change):
    tasks = [{"name": "a", "weight": 1.0, "origin": {"sha256": "0"}}]
    expected = {"by": "images", "shares": {"a": {"a": 1.0}}, "undecided": {}, **change}
    content = {"options": MergeOptions().filled_in([]).describe(), "tasks": tasks, "expected_routing": {"p": expected}}
    with pytest.raises((ValueError, TypeError)):
        MergeRecord.read(content)
