"""Paints the tasks' pictures and writes what is asked about them, as anybody's tasks are written; once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from peft_many.files.atomic import new_folder

from . import looks
from .drawings import Drawings
from .messages import row_of, write_rows
from .painters import Kind
from .tasks import Task

_SPLITS = ("train", "test")
_PICTURES = "pictures"


def paint_tasks(data: Path, tasks: Sequence[Task], cache: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Write pictures, questions and answers of all tasks that are not there yet, and the list of tasks.

    Args:
        data (`Path`): The folder to write; what is there is kept.
        tasks (`Sequence[Task]`): Which.
        cache (`Path`): Where the packages are.
        counts (`dict[str, int]`): How many pictures of each kind, for `"train"` and `"test"`.
        seed (`int`): The same seed gives the same pictures and questions.
    """
    drawings = Drawings(cache)
    for kind in dict.fromkeys(task.kind for task in tasks):
        folder = data / _PICTURES / kind.name
        if not folder.exists():
            with new_folder(folder) as partial:
                _paint(kind, partial, drawings, counts, seed)
    for number, task in enumerate(tasks):
        if not (data / task.name).exists():
            with new_folder(data / task.name) as partial:
                for split in _SPLITS:
                    rows = _rows(task, data, split, np.random.default_rng([seed, number, len(split)]))
                    write_rows(partial / f"{split}.jsonl", rows)
    (data / "tasks.json").write_text(json.dumps([task.name for task in tasks]) + "\n", encoding="utf-8")


def _paint(kind: Kind, folder: Path, drawings: Drawings, counts: dict[str, int], seed: int) -> None:
    for split in _SPLITS:
        (folder / split).mkdir()
        rng = np.random.default_rng([seed, kind.stream, _SPLITS.index(split)])
        facts = []
        for number in tqdm(range(counts[split]), desc=f"painting {kind.name}, {split}", leave=False, mininterval=1):
            picture, known = kind.paint(drawings, rng, split)
            (folder / split / f"{number:05}.jpg").write_bytes(looks.jpeg(rng, picture))
            facts.append(known)
        write_rows(folder / f"{split}.jsonl", facts)


def _rows(task: Task, data: Path, split: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    facts = data / _PICTURES / task.kind.name / f"{split}.jsonl"
    known = [json.loads(line) for line in facts.read_text(encoding="utf-8").splitlines()]
    names = (f"{_PICTURES}/{task.kind.name}/{split}/{number:05}.jpg" for number in range(len(known)))
    return [row_of(name, *task.ask(each, rng)) for name, each in zip(names, known)]
