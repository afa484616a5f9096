"""UCIT's and MLLM-DCL's files, in every layout that is known, and what is wrong with them."""

from __future__ import annotations

import json

import pytest

from tests.examples import toy

data, tasks = toy.example("data"), toy.example("tasks")


def test_examples_are_read(tmp_path):
    toy.add_task(tmp_path, "IconQA", ["red", "blue"])
    task = tasks.find_task("iconqa")
    first, second = data.training_examples(task, tmp_path)
    assert (first.question, first.answer) == ("What colour is it ?", "red")
    assert first.image == tmp_path / "datasets" / "IconQA" / "images" / "0.png"
    assert [example.id for example in data.question_examples(task, tmp_path)] == [0, 1]
    row = data.Examples([first, second])[1]
    (image,) = row["images"]
    assert (row["answer"], image.size, image.mode) == ("blue", (20, 16), "RGB")
    assert image.getpixel((3, 3)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("name", "folder", "names", "images"),
    [
        ("CLEVR-Math", "CLEVR-Math", ("train.json", "test.json"), "datasets"),
        ("CLEVR-Math", "instructions/CLEVR", ("train_4w.json", "test_3000.json"), "datasets"),
        ("Flickr30k", "Flickr30k-cap", ("train_brief_4w.json", "test_3000.json"), ""),
        ("Med", "Med", ("train.json", "test.json"), ""),
    ],
)
def test_layouts(tmp_path, name, folder, names, images):
    toy.add_task(tmp_path, folder, ["red"], names=names, images=images)
    task = tasks.find_task(name)
    assert data.training_examples(task, tmp_path)[0].image.is_file()
    assert data.question_examples(task, tmp_path)[0].image.is_file()


def test_image_names_may_begin_at_the_tasks_folder_or_elsewhere(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat ?"}, {"from": "gpt", "value": "red"}]
    toy.write(tmp_path / "RS" / "train.json", [{"image": "images/0.png", "conversations": turns}])
    toy.save_image(tmp_path / "elsewhere" / "images" / "0.png", "red")
    task = tasks.find_task("RS")
    with pytest.raises(FileNotFoundError, match=r"'images/0.png' of .* is in none of .*--images"):
        data.training_examples(task, tmp_path)
    found = data.training_examples(task, tmp_path, tmp_path / "elsewhere")[0]
    assert found.image == tmp_path / "elsewhere" / "images" / "0.png"
    toy.save_image(tmp_path / "RS" / "images" / "0.png", "blue")
    assert data.training_examples(task, tmp_path)[0].image == tmp_path / "RS" / "images" / "0.png"


def test_references_are_in_the_order_of_the_questions(tmp_path):
    toy.add_captions(tmp_path, "VizWiz", [["red a", "red b"], ["blue a"]])
    task = tasks.find_task("VizWiz")
    assert data.reference_captions(task, tmp_path) == [["red a", "red b"], ["blue a"]]
    path = tmp_path / "VizWiz" / "val_coco_type_3000.json"
    content = json.loads(path.read_text())
    content["annotations"].reverse()
    toy.write(path, content)
    assert data.reference_captions(task, tmp_path) == [["red b", "red a"], ["blue a"]]
    content["annotations"] = [annotation for annotation in content["annotations"] if annotation["image_id"] == 2]
    toy.write(path, content)
    with pytest.raises(ValueError, match="without gaps"):
        data.reference_captions(task, tmp_path)
    toy.write(path, {"annotations": [{"image_id": 1}]})
    with pytest.raises(ValueError, match=r"no file of COCO captions: KeyError\('caption'\)"):
        data.reference_captions(task, tmp_path)


def test_caption_questions_need_no_answer(tmp_path):
    toy.save_image(tmp_path / "datasets" / "0.png", "red")
    for folder in ("VizWiz", "IconQA"):
        toy.write(tmp_path / folder / "test.json", [{"question_id": 7, "image": "0.png", "text": "What ?"}])
    assert data.question_examples(tasks.find_task("VizWiz"), tmp_path)[0].answer is None
    with pytest.raises(ValueError, match="question 7 of IconQA has no 'answer'"):
        data.question_examples(tasks.find_task("IconQA"), tmp_path)


HUMAN, GPT = {"from": "human", "value": "<image>\nWhat ?"}, {"from": "gpt", "value": "red"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "0.png"}, "entry 1: it has no 'conversations'"),
        ({"conversations": [HUMAN, GPT]}, "entry 1: it has no 'image'"),
        ({"image": ["0.png"], "conversations": [HUMAN, GPT]}, "'image' must be one name"),
        ({"image": "0.png", "conversations": [HUMAN, GPT, HUMAN, GPT]}, "not turns by: human, gpt, human, gpt"),
        ({"image": "0.png", "conversations": [GPT]}, "not turns by: gpt"),
        ({"image": "0.png", "conversations": [{**HUMAN, "value": "<image><image>"}, GPT]}, "about one image"),
        ({"image": "../0.png", "conversations": [HUMAN, GPT]}, "leads out of the image folder"),
        ({"image": "/etc/passwd", "conversations": [HUMAN, GPT]}, "leads out of the image folder"),
        ("text", "entry 1"),
    ],
)
def test_bad_records_are_named(tmp_path, record, message):
    toy.save_image(tmp_path / "datasets" / "0.png", "red")
    good = {"image": "0.png", "conversations": [HUMAN, GPT]}
    toy.write(tmp_path / "IconQA" / "train.json", [good, record])
    with pytest.raises(ValueError, match=message):
        data.training_examples(tasks.find_task("IconQA"), tmp_path)


def test_what_is_missing_is_named(tmp_path):
    task = tasks.find_task("IconQA")
    with pytest.raises(
        FileNotFoundError, match=r"IconQA's files are not under[\s\S]*instructions/IconQA/train_4w.json"
    ):
        data.training_examples(task, tmp_path)
    toy.add_task(tmp_path, "IconQA", ["red"] * 3)
    (tmp_path / "datasets" / "IconQA" / "images" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 images .*1.png'"):
        data.training_examples(task, tmp_path)
    toy.write(tmp_path / "IconQA" / "train_4w.json", [])
    with pytest.raises(ValueError, match="two files of the same kind"):
        data.training_examples(task, tmp_path)
    (tmp_path / "IconQA" / "train.json").unlink()
    with pytest.raises(ValueError, match="at least one"):
        data.training_examples(task, tmp_path)
    (tmp_path / "IconQA" / "train_4w.json").write_text("[{")
    with pytest.raises(ValueError, match="no JSON file"):
        data.training_examples(task, tmp_path)


def test_an_image_that_is_none_is_named(tmp_path):
    toy.add_task(tmp_path, "IconQA", ["red"])
    (tmp_path / "datasets" / "IconQA" / "images" / "0.png").write_bytes(b"text")
    examples = data.Examples(data.training_examples(tasks.find_task("IconQA"), tmp_path))
    with pytest.raises(ValueError, match=r"0.png' cannot be read"):
        examples[0]


def test_tasks_by_name():
    assert [task.name for task in tasks.find_tasks(["ucit"])] == [
        "ImageNet-R",
        "ArxivQA",
        "VizWiz",
        "IconQA",
        "CLEVR-Math",
        "Flickr30k",
    ]
    assert [task.name for task in tasks.find_tasks(["MLLM-DCL"])] == ["RS", "Med", "AD", "Sci", "Fin"]
    assert [task.name for task in tasks.find_tasks(["Fin", "fin", "RS"])] == ["Fin", "RS"]
    assert {(task.rank, task.learning_rate, task.epochs) for task in tasks.find_tasks(["UCIT"])} == {(16, 2e-4, 1)}
    with pytest.raises(ValueError, match="no task 'VQAv2'; there are ImageNet-R"):
        tasks.find_task("VQAv2")
