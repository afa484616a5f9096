"""Where a task's data are: files and folders, data sets of the Hub, or rows in memory; and its images."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from peft.utils import PeftWarning

from ..records.words import counted, quoted
from .conversations import Example, examples_of, images_elsewhere

_JSON = (".json", ".jsonl")
_BY_DATASETS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_NOT_FILES = ("http://", "https://", "data:")


def read_examples(
    data: Any,
    *,
    split: str = "train",
    images: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> list[Example]:
    """Read a task's data: one example for each answer in it.

    Rows are conversations as chat templates take them, with images in the parts of a content or in a list beside it,

        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"},
                                                   {"type": "text", "text": "What is it?"}]},
                      {"role": "assistant", "content": "..."}]}

    or LLaVA's (`conversations` of turns with `from` and `value`, where `<image>` stands for the `image`), or TRL's
    (`prompt` and `completion`), or a question (`question` or `text`) with its `answer`, `answers`, `caption` or
    `captions`. A row without an image is a question in words.

    Args:
        data (`str`, `os.PathLike` or `Iterable`):
            A file (`.json`, `.jsonl`, `.parquet`, `.csv`), a folder that `datasets` reads, the Hub id of a data set
            (`"me/clevr"`, `"me/clevr@revision"`), a `datasets.Dataset`, or rows.
        split (`str`, defaults to `"train"`): Which part of a data set that has several; files are read whole.
        images (`str` or `os.PathLike`, *optional*):
            The folder that names of images begin at. By default that of the file, or one beside or above it.
        limit (`int`, *optional*): Read no more than this number of rows.
        seed (`int`, *optional*): Choose these at random; the first ones by default.

    Returns:
        `list[Example]`: In the order of the rows.

    Raises:
        ValueError: A row is in no format that is known, or there is none.
        FileNotFoundError: The data, or one of its images, are not there.
        ImportError: The data are read by `datasets`, which is not installed.
    """
    rows, name, folders = _rows(data, split, limit if seed is None else None)
    places: Iterable[int] = range(len(rows))[:limit]
    if seed is not None and limit is not None:
        places = random.Random(seed).sample(range(len(rows)), min(limit, len(rows)))
    if images is not None:
        folders = [Path(images).expanduser()]
        if not folders[0].is_dir():
            raise FileNotFoundError(f"There is no folder '{images}', which `--images` (`images=`) names.")
    found: list[Example] = []
    unread: dict[str, None] = {}
    for place in places:
        try:
            row = _plain(rows[place])
            found += examples_of(row, lambda image: _located(image, folders, name))
            unread |= dict.fromkeys(images_elsewhere(row))
        except (KeyError, TypeError, AttributeError, IndexError, StopIteration, ValueError) as error:
            said = str(error) if type(error) is ValueError else repr(error)
            raise ValueError(f"{name}, row {place}, cannot be used: {said}.{_other_data(data)}") from error
    empty = sum(not example.answer for example in found)
    if empty == len(found):
        raise ValueError(f"{name} holds no row with an answer{', but only with empty ones' if found else ''}.")
    if unread and not any(example.images for example in found):
        warnings.warn(
            f"{name} is read as questions without images: images are in the columns 'image' or 'images', and not in "
            f"{quoted(unread)}.",
            PeftWarning,
            stacklevel=3,
        )
    if empty:
        warnings.warn(
            f"{empty} of the {counted(len(found), 'answer')} in {name} are empty: correct these rows, or leave them "
            "out.",
            PeftWarning,
            stacklevel=3,
        )
    return found


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, or an error that says what is wrong with it."""
    place = Path(path).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"There is no file '{place}'.")
    try:
        text = place.read_text(encoding="utf-8-sig")  # some programs, on Windows mostly, begin files with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"'{place}' is no text in UTF-8: {error.reason} at byte {error.start}.") from None
    if not text.strip():
        raise ValueError(f"'{place}' is empty.")
    return text


def opened(picture: Any) -> Any:
    """A `PIL.Image.Image` in RGB of what [`read_examples`] gives for an image: a path, an address, its bytes, itself.

    Raises:
        ValueError: It is no image that can be read.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
        from transformers.image_utils import load_image
    except ImportError as error:
        raise ImportError(f"Images are opened by Pillow: `pip install pillow`. ({error})") from None
    try:
        if isinstance(picture, Mapping):
            content = picture.get("bytes")
            picture = picture["path"] if content is None else Image.open(io.BytesIO(content))
        return load_image(str(picture) if isinstance(picture, os.PathLike) else picture)
    except (OSError, KeyError, TypeError, ValueError) as error:
        named = isinstance(picture, (str, os.PathLike))
        shown = picture if named else f"of type {type(picture).__name__}"
        why: Any = error
        if named and not str(picture).startswith(_NOT_FILES) and not os.path.isfile(picture):
            why = "it is a folder" if os.path.isdir(picture) else "there is no such file"  # it was tried as base64
        raise ValueError(f"The image '{shown!s:.200}' cannot be read: {why}.") from error


def _rows(data: Any, split: str, first: int | None) -> tuple[Sequence[Any], str, list[Path]]:
    """The rows of some data, what to call it in errors, and where its images may be."""
    if not isinstance(data, (str, os.PathLike)):
        data = _split_of(data, split, "The data set")
        # Images as they are stored: they are opened when they are wanted.
        rows = data.with_format("arrow") if hasattr(data, "with_format") and hasattr(data, "__len__") else data
        return rows if hasattr(rows, "__getitem__") else list(islice(rows, first)), "The data", [Path()]
    path = Path(data).expanduser()
    if path.suffix in _JSON and (path.is_file() or not path.is_dir()):
        return _json_rows(path), f"'{path}'", [path.parent, path.parent.parent, path.parent.parent / "datasets"]
    folder = path if path.is_dir() else path.parent
    return _by_datasets(str(data), path, split).with_format("arrow"), f"'{data}'", [folder]


def _json_rows(path: Path) -> list[Any]:
    text = read_text(path)
    try:
        rows = json.loads(text) if path.suffix == ".json" else _json_lines(text)
    except ValueError as error:
        raise ValueError(
            f"'{path}' is no {path.suffix[1:].upper()} file: {error}.{_other_ending(path, text)}"
        ) from error
    if not isinstance(rows, list) or any(isinstance(row, list) for row in rows[:1]):
        what = "a list of rows" if path.suffix == ".json" else "one row a line"
        raise ValueError(f"'{path}' must hold {what}, but it holds {_kind(rows)}.{_other_ending(path, text)}")
    return rows


def _kind(rows: Any) -> str:
    return "lists" if isinstance(rows, list) else f"a single {type(rows).__name__}"


def _other_ending(path: Path, text: str) -> str:
    """A hint, if a file is in the other of the two formats than its name says."""
    with contextlib.suppress(ValueError):
        if path.suffix == ".json":
            rows = _json_lines(text)
            if len(rows) > 1 and all(isinstance(row, dict) for row in rows):
                return " Each of its lines is a row: rename it to end in .jsonl."
        elif isinstance(json.loads(text), list):
            return " It is one list of rows: rename it to end in .json."
    return ""


def _other_data(data: Any) -> str:
    """A hint, if a folder's rows are not what `datasets` takes for them: files of pictures, mostly."""
    folder = Path(data).expanduser() if isinstance(data, (str, os.PathLike)) else None
    if folder is None or not folder.is_dir():
        return ""
    inside = sorted(str(path) for path in folder.iterdir() if path.suffix in _JSON)
    return f" If the rows are in {quoted(inside[:3])}, give that file." if inside else ""


def _json_lines(text: str) -> list[Any]:
    rows = []
    # Not by `splitlines`, which would also cut where a text has one of Unicode's line separators in it.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:  # which takes each line for the first
            reason = error.msg.removesuffix(" starting at")  # which JSON's own message goes on after
            raise ValueError(f"line {number}, column {error.colno}: {reason}") from error
    return rows


def _by_datasets(given: str, path: Path, split: str) -> Any:
    if not path.exists() and path.suffix in _BY_DATASETS:
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"'{given}' is read by the library `datasets`, which is not installed: `pip install datasets`. Files of "
            "JSON (.json, .jsonl) need nothing."
        ) from None
    if path.is_file():
        if path.suffix not in _BY_DATASETS:
            raise ValueError(f"'{path}' is no data file; these end in {', '.join((*_JSON, *_BY_DATASETS))}.")
        return datasets.load_dataset(_BY_DATASETS[path.suffix], data_files=str(path), split="train")
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _split_of(datasets.load_from_disk(str(path)), split, f"'{path}'")
        given, revision = str(path), ""
    else:
        given, _, revision = given.partition("@")
    try:
        return datasets.load_dataset(given, split=split, revision=revision or None)
    except ValueError as error:
        raise ValueError(
            f"'{given}' cannot be read as a data set with a split '{split}' (`--split`): {error}{_other_data(given)}"
        ) from None


def _split_of(data: Any, split: str, name: str) -> Any:
    """One of the splits of data that have several, or all of other data."""
    if not isinstance(data, Mapping):
        return data
    if split not in data:
        raise ValueError(f"{name} has no split '{split}' (`--split`), but {quoted(data)}.")
    return data[split]


def _plain(row: Any) -> Mapping[str, Any]:
    """A row as a mapping; one of a data set is a table with one row, in which images are not opened yet."""
    if hasattr(row, "to_pylist"):
        (row,) = row.to_pylist()
    if not isinstance(row, Mapping):
        raise ValueError(f"it must map columns to values, but it is a {type(row).__name__}")
    return row


def _located(image: Any, folders: Sequence[Path], name: str) -> Any:
    """An image's place: of a name, the first of the folders that has it."""
    stored = isinstance(image, Mapping) and image.get("bytes") is not None
    named = image["path"] if isinstance(image, Mapping) and not stored else image
    if not isinstance(named, (str, os.PathLike)) or str(named).startswith(_NOT_FILES):
        return named
    given = str(named).removeprefix("file://")
    found = next((folder / given for folder in folders if (folder / given).is_file()), None)
    if found is None:
        places = " or ".join(f"'{folder}'" for folder in folders)
        raise FileNotFoundError(
            f"There is no image '{given}', which {name} names, in {places}: say by `--images`, in Python `images=`, "
            "which folder the image paths are relative to."
        )
    return found
