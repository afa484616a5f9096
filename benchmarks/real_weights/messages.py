"""Tasks as folders, `<data>/<task>/train.jsonl` and `test.jsonl` (or `.json`), in formats that the package reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_many.data.conversations import Example
from peft_many.data.reading import read_examples


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
        return read_examples(self.train if split == "train" else self.test, limit=limit)


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
