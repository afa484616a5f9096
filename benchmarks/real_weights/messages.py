"""Tasks as files: `<data>/<task>/train.jsonl` and `test.jsonl`, in the formats that people have.

A row is a conversation in the format of chat templates, where images are paths, or in a list `images` beside it,

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "?"}]},
                  {"role": "assistant", "content": "..."}]}

or LLaVA's (`{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n?"}, {"from": "gpt", ...}]}`),
or a test question of LLaVA's benchmarks (`{"image": "a.jpg", "text": "...", "answer": "..."}`). Files are JSON lists
(`.json`) or JSON lines (`.jsonl`). A row without an image is a question in words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, Any]
IMAGE_MARK = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Example:
    """A conversation up to one answer.

    Args:
        messages (`Sequence[Message]`): Everything before the answer; every content is a list of parts.
        answer (`str`): What the assistant says next.
        images (`Sequence[Path]`): In the order of the image parts.
    """

    messages: Sequence[Message]
    answer: str
    images: Sequence[Path]

    @property
    def question(self) -> str:
        """The words of the last message."""
        return " ".join(part["text"] for part in self.messages[-1]["content"] if part["type"] == "text")


@dataclass(frozen=True)
class TaskFiles:
    """One task of a data folder.

    Args:
        name (`str`): What its folder is called.
        train (`Path`): To train on.
        test (`Path`): To ask.
    """

    name: str
    train: Path
    test: Path

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """The examples of `"train"` or `"test"`, the first `limit` rows of them."""
        return read_examples(self.train if split == "train" else self.test, limit)


def find_tasks(data: Path, names: Sequence[str] | None = None) -> list[TaskFiles]:
    """The tasks of a data folder, in the order of `names`, or else of the folder's `tasks.json` or the alphabet.

    Raises:
        FileNotFoundError: A task is not there.
    """
    listed = data / "tasks.json"
    if names is None and listed.is_file():
        names = json.loads(listed.read_text(encoding="utf-8"))
    if names is None:
        names = sorted(path.name for path in data.iterdir() if _file(path, "train") and _file(path, "test"))
    found = []
    for name in names:
        train, test = _file(data / name, "train"), _file(data / name, "test")
        if train is None or test is None:
            raise FileNotFoundError(f"'{data / name}' has no train and test file (.jsonl or .json).")
        found.append(TaskFiles(name, train, test))
    if not found:
        raise FileNotFoundError(f"There are no tasks in '{data}': no folder with a train and a test file in it.")
    return found


def read_examples(path: Path, limit: int | None = None) -> list[Example]:
    """One example for each answer in a file.

    Raises:
        ValueError: A row is in none of the formats.
        FileNotFoundError: An image is missing.
    """
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    examples: list[Example] = []
    for number, row in enumerate(rows[:limit]):
        try:
            examples += _examples_of(row, path)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"'{path}', row {number}, is in no format that is known: {error!r}.") from error
    return examples


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


def row_of(image: str, question: str, answer: str) -> dict[str, Any]:
    """A row about one image."""
    asked = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    said = [{"type": "text", "text": answer}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def _file(folder: Path, split: str) -> Path | None:
    return next((path for ending in ("jsonl", "json") if (path := folder / f"{split}.{ending}").is_file()), None)


def _examples_of(row: dict[str, Any], path: Path) -> Iterator[Example]:
    named = row.get("images", row.get("image"))
    beside = [] if named is None else [named] if isinstance(named, str) else list(named)
    turns = [(message["role"], _parts(message["content"])) for message in _messages(row)]
    if beside and not any(part["type"] == "image" for _, parts in turns for part in parts):
        first = next(parts for role, parts in turns if role == "user")
        first[:0] = [{"type": "image"} for _ in beside]
    before: list[Message] = []
    images: list[Path] = []
    for role, parts in turns:
        if role == "assistant":
            if not before:
                raise ValueError("the conversation begins with the assistant")
            answer = "".join(part["text"] for part in parts).strip()
            yield Example(tuple(before), answer, tuple(images))
        for part in parts:
            if part["type"] == "image":
                own = part.pop("image", None) or part.pop("path", None)
                images.append(_image(own or beside.pop(0), path))
        before.append({"role": role, "content": parts})
    if beside:
        raise ValueError(f"there is no place for the image '{beside[0]}'")


def _messages(row: dict[str, Any]) -> list[Message]:
    if "messages" in row:
        return row["messages"]
    if "conversations" in row:
        return [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    return [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": str(row["answer"])}]


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Text with image marks as parts; parts without what is empty in them, as `datasets` writes it."""
    if not isinstance(content, str):
        return [{key: value for key, value in part.items() if value is not None} for part in content]
    parts: list[dict[str, Any]] = []
    for position, text in enumerate(content.split(IMAGE_MARK)):
        parts += [{"type": "image"}] if position else []
        parts += [{"type": "text", "text": text.strip()}] if text.strip() else []
    return parts


def _image(name: str, path: Path) -> Path:
    """An image, named from the file's folder, the data folder, or `datasets` in it, where benchmarks keep them."""
    folders = (path.parent, path.parent.parent, path.parent.parent / "datasets")
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"The image '{name}' of '{path}' is in none of {', '.join(map(str, folders))}.")
    return found
