"""Reading tasks' data: every format that people have, from files, data sets and memory; and what is said of others."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from peft.utils import PeftWarning
from PIL import Image

from peft_many.data import reading
from peft_many.data.reading import opened, read_examples
from tests.examples import toy

datasets = pytest.importorskip("datasets")
ROW = {"image": "a.png", "question": "What?", "answer": "red"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(colour: str = "red") -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(stored, "PNG")
    return stored.getvalue()


def test_all_formats_are_read(tmp_path):
    for name in ("a.png", "datasets/b.png"):
        toy.save_image(tmp_path / name, "red")
    parts = [{"type": "image", "image": "a.png", "text": None}, {"type": "text", "text": "What?", "image": None}]
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
    turns = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "red"}]
    rows = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]},
        {
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}],
            "images": ["a.png"],
        },
        {
            "image": "b.png",
            "conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "red"}],
        },
        {"question_id": 3, "image": "b.png", "text": "What?", "answer": "red"},
        {"messages": said},
    ]
    path = tmp_path / "task" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = read_examples(path)
    assert [example.question for example in found] == ["What?"] * 5
    assert [example.answer for example in found] == ["red"] * 5
    assert [len(example.images) for example in found] == [1, 1, 1, 1, 0]
    assert [part["type"] for part in found[2].messages[0]["content"]] == ["text", "image"]
    turns = [("human", "<image>\nWhat?"), ("gpt", "red"), ("human", "And?"), ("gpt", "no")]
    long = {"image": "b.png", "conversations": [{"from": speaker, "value": value} for speaker, value in turns]}
    one, two = read_examples(toy.write(tmp_path / "task" / "test.json", [long]))
    assert (one.answer, len(one.messages), two.answer, len(two.messages)) == ("red", 1, "no", 3)
    assert two.images == one.images


@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        ({"image": "none.png", "text": "What?", "answer": "red"}, FileNotFoundError, "none.png"),
        ({"question": "What?"}, ValueError, "row 0"),
        ({"image": ["a.png", "a.png"], "text": "<image>?", "answer": "x"}, ValueError, "'a.png' is left over"),
        ({"text": "<image>?", "answer": "x"}, ValueError, "row 0"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, ValueError, "begins with the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "v"}]}]}, ValueError, "type 'video'"),
        ({"messages": [{"role": "user", "content": "?"}]}, ValueError, "no row with an answer"),
        ("What?", ValueError, "must map columns to values, but it is a str"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, row, error, match):
    toy.save_image(tmp_path / "task" / "a.png", "red")
    with pytest.raises(error, match=match):
        read_examples(toy.write(tmp_path / "task" / "train.json", [row]))


@pytest.mark.parametrize(
    ("row", "answer", "references"),
    [
        (ROW, "red", ("red",)),
        ({"question": "What?", "answers": ["red", "blue", "blue"]}, "blue", ("red", "blue", "blue")),
        ({"question": "What?", "answers": [{"answer": "red", "answer_id": 1}]}, "red", ("red",)),
        ({"question": "What?", "captions": ["a cat", "the cat"]}, "a cat", ("a cat", "the cat")),
        ({"question": "What?", "answer": 3}, "3", ("3",)),
        ({"prompt": "What?", "completion": "red"}, "red", ()),
        (
            {
                "images": ["a.png"],
                "prompt": [{"role": "user", "content": "What?"}],
                "completion": [{"role": "assistant", "content": "red"}],
            },
            "red",
            (),
        ),
        ({"conversations": [{"role": "user", "content": "What?"}, {"from": "gpt", "value": "red"}]}, "red", ()),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                                                 {"type": "text", "text": "What?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
                ]
            },
            "red",
            (),
        ),
    ],
)  # fmt: skip
def test_further_formats(tmp_path, row, answer, references):
    toy.save_image(tmp_path / "a.png", "red")
    (found,) = read_examples(toy.write(tmp_path / "rows.json", [row]))
    assert (found.question, found.answer, found.references) == ("What?", answer, references)
    assert found.images == ((tmp_path / "a.png",) if "a.png" in json.dumps(row) else ())


def test_every_place_gives_the_same(tmp_path):
    """Rows in memory, a file, parquet with images inside, a folder that `datasets` saved, one that it reads."""
    (tmp_path / "a.png").write_bytes(picture())
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    stored = datasets.Dataset.from_list([{**ROW, "image": {"bytes": picture(), "path": None}}], features=features)
    stored.to_parquet(tmp_path / "rows.parquet")
    stored.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict({"train": stored, "test": stored})
    splits.save_to_disk(tmp_path / "several")
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "question": "What?", "answer": "red"}))
    places = [
        [{**ROW, "image": Image.new("RGB", (4, 4), "red")}],
        iter([{**ROW, "image": str(tmp_path / "a.png")}]),
        toy.write(tmp_path / "rows.json", [ROW]),
        tmp_path / "rows.parquet",
        str(tmp_path / "one"),
        tmp_path / "several",
        folder,
        stored,
        splits,
    ]
    for place in (tmp_path / "several", splits):
        with pytest.raises(ValueError, match=r"has no split 'dev' \(`--split`\), but 'train', 'test'"):
            read_examples(place, split="dev")
    with pytest.raises(ValueError, match=r"pictures' cannot be read as a data set with a split 'dev' \(`--split`\)"):
        read_examples(folder, split="dev")
    for place in places:
        (found,) = read_examples(place)
        assert (found.question, found.answer) == ("What?", "red"), place
        assert opened(found.images[0]).tobytes() == Image.new("RGB", (4, 4), "red").tobytes(), place


def test_a_folder_of_pictures_names_the_file_that_the_rows_may_be_in(tmp_path):
    for name in "abc":  # more than other files, by which `datasets` tells what a folder is
        (tmp_path / f"{name}.png").write_bytes(picture())
    toy.write(tmp_path / "rows.json", [ROW])
    with pytest.raises(ValueError, match=r"has the columns 'image', .*If the rows are in '.*/rows.json', give that"):
        read_examples(tmp_path)
    (found,) = read_examples(tmp_path / "rows.json")
    assert found.answer == "red"


def test_a_column_of_images_that_is_not_read_is_named():
    rows = [{"img": "a.png", "question": "What?", "answer": "red"}]
    said = "The data is read as questions without images: .* and not in 'img'"
    with pytest.warns(PeftWarning, match=said):
        read_examples(rows)
    with pytest.warns(PeftWarning, match=said):
        read_examples([{**rows[0], "img": Image.new("RGB", (4, 4))}])


def test_data_sets_of_the_hub_are_asked_for_by_id_revision_and_split(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "What?", "answer": "red"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    read_examples("me/clevr")
    read_examples("me/clevr@v2", split="test")
    assert asked == [
        (("me/clevr",), {"split": "train", "revision": None}),
        (("me/clevr",), {"split": "test", "revision": "v2"}),
    ]


def test_images_begin_at_the_folder_that_is_named(tmp_path):
    toy.save_image(tmp_path / "elsewhere" / "a.png", "red")
    path = toy.write(tmp_path / "deep" / "down" / "rows.json", [ROW])
    with pytest.raises(FileNotFoundError, match="which folder the image paths are relative to"):
        read_examples(path)
    with pytest.raises(FileNotFoundError, match="There is no folder 'nowhere', which `--images`"):
        read_examples(path, images="nowhere")
    (found,) = read_examples(path, images=tmp_path / "elsewhere")
    assert found.images == (tmp_path / "elsewhere" / "a.png",)


def test_rows_are_chosen_by_a_seed_and_only_these_are_looked_at():
    rows = [{"question": str(number), "answer": "x"} for number in range(50)] + [{"nonsense": 1}] * 50
    assert [one.question for one in read_examples(rows, limit=3)] == ["0", "1", "2"]
    chosen = [[one.question for one in read_examples(rows[:50], limit=8, seed=seed)] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 8
    assert len(read_examples(rows[:5], limit=8, seed=0)) == 5


def test_lines_end_where_lines_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "one\u2028two", "answer": "x"}\n\n{"question": "three", "answer": "y"}\r\n')
    assert [one.question for one in read_examples(path)] == ["one\u2028two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "error", "match"),
    [
        ("none.jsonl", None, FileNotFoundError, "There is no file"),
        ("none.parquet", None, FileNotFoundError, "There is no file"),
        ("bad.jsonl", "{", ValueError, "is no JSONL file"),
        (
            "cut.jsonl",
            '{"question": "?", "answer": "x"}\n\n{"question',
            ValueError,
            "line 3, column 2: Unterminated string.$",
        ),
        ("map.json", "{}", ValueError, "must hold a list of rows, but it holds a single dict.$"),
        ("lines.json", '{"question": "?"}\n{"question": "!"}', ValueError, "is a row: rename it to end in .jsonl"),
        ("list.jsonl", '[\n{"question": "?"}\n]', ValueError, "is one list of rows: rename it to end in .json"),
        (
            "list.jsonl",
            '[{"question": "?"}]',
            ValueError,
            "holds lists. It is one list of rows: rename",
        ),
        ("empty.jsonl", "\n", ValueError, "'.*empty.jsonl' is empty"),
        ("none.json", b"\xff{}", ValueError, "is no text in UTF-8: invalid start byte at byte 0"),
        ("rows.xml", "<a/>", ValueError, "is no data file; these end in .json"),
        ("empty.json", "[]", ValueError, "no row with an answer"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, error, match):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=match):
        read_examples(tmp_path / name)


def test_empty_answers_are_counted():
    rows = [{"question": "?", "answer": answer} for answer in ("x", "", " ")]
    with pytest.warns(match="2 of the 3 answers in The data are empty"):
        read_examples(rows)
    with pytest.raises(ValueError, match="The data holds no row with an answer, but only with empty ones"):
        read_examples(rows[1:])


def test_without_datasets_it_is_said_what_needs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_examples("me/clevr")
    (found,) = read_examples(toy.write(tmp_path / "rows.json", [{"question": "?", "answer": "x"}]))
    assert found.answer == "x"


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_it(tmp_path, name):
    content = json.dumps(ROW | {"image": None})
    (tmp_path / name).write_text(f"[{content}]" if name == "rows.json" else content, encoding="utf-8-sig")
    (found,) = read_examples(tmp_path / name)
    assert found.answer == "red"


@pytest.mark.parametrize(("bad", "why"), [("nowhere.png", "there is no such file"), (".", "it is a folder")])
def test_an_image_that_is_no_file_is_not_called_wrong_base64(tmp_path, monkeypatch, bad, why):
    monkeypatch.chdir(tmp_path)
    for given in (bad, Path(bad)):
        with pytest.raises(ValueError, match=f"cannot be read: {why}"):
            opened(given)


@pytest.mark.parametrize("bad", [Path("text.png"), {"bytes": b"text"}, {"path": "nowhere"}, "data:image/png;base64,!"])
def test_images_that_are_none(tmp_path, monkeypatch, bad):
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("text")
    with pytest.raises(ValueError, match="cannot be read"):
        opened(bad)


def test_an_image_within_an_address():
    found = opened("data:image/png;base64," + base64.b64encode(picture()).decode())
    assert found.size == (4, 4)
    assert reading._located(address := "https://example.org/a.png", [], "x") == address
