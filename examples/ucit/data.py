"""UCIT's and MLLM-DCL's JSON files: read, checked, and given out one image, question and answer at a time.

Training files hold LLaVA's conversations, test files one question each (`llava/train/train.py` and
`llava/eval/CoIN/model_others.py` in github.com/Ghy0501/MCITlib):

    [{"id": ..., "image": "CLEVR/images/train/0.png",
      "conversations": [{"from": "human", "value": "<image>\\nHow many ...?"}, {"from": "gpt", "value": "3"}]}, ...]
    [{"question_id": 0, "image": "CLEVR/images/test/0.png", "text": "How many ...?", "answer": "3"}, ...]

Test files of caption tasks need no answer; their references are in a COCO file whose `image_id` counts the questions
from 1 (`eval_caption.py` there).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import Task
from torch.utils.data import Dataset

from peft_many.data.conversations import question_about
from peft_many.data.reading import opened

IMAGE_MARK = "<image>"
# Where instruction files and images lie under the benchmark's folder, by the layouts in use.
_INSTRUCTION_FOLDERS = ("", "instructions")
_IMAGE_FOLDERS = ("datasets", "")


@dataclass(frozen=True)
class Example:
    """One question about one image.

    Args:
        id (`int` or `str`): `question_id` of a test question, the position in the file of a training example.
        image (`Path`): The image file.
        image_name (`str`): What the instruction file calls it.
        question (`str`): Without the image's mark.
        answer (`str`, *optional*): The true answer; test questions of caption tasks have none here.
    """

    id: int | str
    image: Path
    image_name: str
    question: str
    answer: str | None


class Examples(Dataset[dict[str, Any]]):
    """The examples of a task with their images opened, as [`ChatCollator`] takes them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        images = [opened(example.image)]
        asked = question_about(images, example.question)
        return {"id": example.id, "messages": list(asked.messages), "images": images, "answer": example.answer}


def training_examples(task: Task, root: Path, images: Path | None = None) -> list[Example]:
    """A task's training examples; every image is known to be there.

    Args:
        task ([`Task`]): The task.
        root (`Path`): The benchmark's folder; see the README for the layouts that are known.
        images (`Path`, *optional*): The folder that the files' image names begin at, if it is not found by itself.

    Raises:
        FileNotFoundError: A file, or some image, is missing.
        ValueError: The file is not in the format.
    """
    return _read(task, root, images, task.train, _of_conversation)


def question_examples(task: Task, root: Path, images: Path | None = None) -> list[Example]:
    """A task's test questions; as `training_examples`."""
    examples = _read(task, root, images, task.test, _of_question)
    unanswered = next((example for example in examples if example.answer is None), None)
    if unanswered is not None and not task.has_captions:
        raise ValueError(f"Test question {unanswered.id!r} of {task.name} has no 'answer'.")
    return examples


def reference_captions(task: Task, root: Path) -> list[list[str]]:
    """The reference captions of each test question of a caption task, in the order of the questions."""
    assert task.references is not None
    path = _find(task, root, (task.references,))
    content = _load(path)
    captions: dict[int, list[str]] = {}
    try:
        for annotation in content["annotations"]:
            captions.setdefault(int(annotation["image_id"]), []).append(str(annotation["caption"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{path}' is no file of COCO captions: {error!r}.") from error
    if sorted(captions) != list(range(1, len(captions) + 1)):
        raise ValueError(f"'{path}': the image_ids must count the test questions from 1, without gaps.")
    return [captions[number] for number in range(1, len(captions) + 1)]


def _read(task: Task, root: Path, images: Path | None, names: Sequence[str], parse: Any) -> list[Example]:
    path = _find(task, root, names)
    records = _load(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"'{path}' must hold a list of examples, and at least one.")
    parsed = []
    for position, record in enumerate(records):
        try:
            parsed.append(parse(position, record))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"'{path}', entry {position}: {reason}.") from error
    folder = _image_folder(path, root, images, parsed[0]["image_name"])
    examples = [Example(image=_inside(folder, entry["image_name"], path), **entry) for entry in parsed]
    missing = [example for example in examples if not example.image.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(examples)} images that '{path}' names are missing, '{missing[0].image}' the "
            "first. Pass the folder that the names begin at as `--images` if it is another."
        )
    return examples


def _of_conversation(position: int, record: dict[str, Any]) -> dict[str, Any]:
    turns = [(turn["from"], turn["value"].strip()) for turn in record["conversations"]]
    if [speaker for speaker, _ in turns] != ["human", "gpt"]:
        speakers = ", ".join(str(speaker) for speaker, _ in turns)
        raise ValueError(f"one question by 'human' and one answer by 'gpt' are expected, not turns by: {speakers}")
    if turns[0][1].count(IMAGE_MARK) > 1:
        raise ValueError("only questions about one image are supported")
    question = turns[0][1].replace(IMAGE_MARK, "").strip()
    return {"id": position, "image_name": _image_name(record), "question": question, "answer": turns[1][1]}


def _of_question(position: int, record: dict[str, Any]) -> dict[str, Any]:
    question = record["text"].replace(IMAGE_MARK, "").strip()
    answer = record.get("answer")
    answer = str(answer) if isinstance(answer, (int, float, str)) else None  # captions may have a list, or nothing
    return {"id": record["question_id"], "image_name": _image_name(record), "question": question, "answer": answer}


def _image_name(record: dict[str, Any]) -> str:
    name = record["image"]
    if not isinstance(name, str):
        raise ValueError(f"'image' must be one name, not {name!r}")
    return name


def _find(task: Task, root: Path, names: Sequence[str]) -> Path:
    tried = [
        root / above / folder / name for above in _INSTRUCTION_FOLDERS for folder in task.folders for name in names
    ]
    found = [path for path in tried if path.is_file()]
    if not found:
        listed = "\n".join(f"  {path}" for path in tried)
        raise FileNotFoundError(f"{task.name}'s files are not under '{root}'. Looked for:\n{listed}")
    if len(found) > 1:
        raise ValueError(f"{task.name} has two files of the same kind, '{found[0]}' and '{found[1]}'; remove one.")
    return found[0]


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON file: {error}.") from error


def _image_folder(path: Path, root: Path, images: Path | None, name: str) -> Path:
    """The folder that image names begin at: given, or the first that has the first image."""
    if images is not None:
        return images
    folders = [*(root / folder for folder in _IMAGE_FOLDERS), path.parent]
    found = next((folder for folder in folders if (folder / name).is_file()), None)
    if found is None:
        tried = ", ".join(f"'{folder}'" for folder in folders)
        raise FileNotFoundError(f"The image '{name}' of '{path}' is in none of {tried}; pass `--images`.")
    return found


def _inside(folder: Path, name: str, path: Path) -> Path:
    """`folder / name`, which must not lead out of the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"'{path}' names the image '{name}', which leads out of the image folder.")
    return folder / name
