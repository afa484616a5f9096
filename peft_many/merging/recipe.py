"""Recipes: long lists of adapters with their weights, revisions, names and options, in a YAML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ..records import MergeOptions
from ..records.values import number
from .arguments import are_names

_FURTHER = ("device", "same_base", "without", "weights")  # what `options` knows beside those of `MergeOptions`


class RecipeError(ValueError):
    """A recipe cannot be used; the message says which entry and why."""


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a recipe: arguments for [`merge_adapter_files`], `output_dir` excepted.

    ```yaml
    adapters:
      - me/iconqa@v2            # a Hub id, or a folder beside the recipe
      - adapter: me/clevr
        revision: main
        weight: 0.5             # multiplies, as in `weights=[…]`
        name: clevr-math        # for a merge a list, one for each of its tasks
    options:                    # any of those below; all may be left out
      method: lpm               # or {name: ties, density: 0.3}
      ridge: 1e-4
    ```

    `options` knows those of [`MergeOptions`], `device`, `same_base` (true or false), `without` (a list of tasks) and
    `weights` (by task name, in place of every `weight`).

    Args:
        path (`str`): The file. Folders in it are relative to where it is.

    Returns:
        `dict[str, Any]`: Use it as `merge_adapter_files(**read_recipe(path), output_dir=...)`.

    Raises:
        FileNotFoundError: There is no such file.
        RecipeError: It is no recipe.

    Example:

        ```py
        >>> from pathlib import Path
        >>> from peft_many import merge_adapter_files, read_recipe

        >>> text = "adapters: [iconqa, {adapter: clevr, weight: 0.5}]"
        >>> _ = Path("tasks.yaml").write_text(text)
        >>> merge_adapter_files(**read_recipe("tasks.yaml"), output_dir="by-recipe")
        PosixPath('by-recipe')
        ```
    """
    path = Path(path).expanduser()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no recipe '{path}'.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}.") from None
    try:
        return _arguments(content, path.parent)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None


def _arguments(content: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(content, dict) or not isinstance(content.get("adapters"), list) or not content["adapters"]:
        raise RecipeError("a recipe needs a list of `adapters`.")
    _check_keys(content, ("adapters", "options"), "a recipe")
    entries = [_entry(entry, i, folder) for i, entry in enumerate(content["adapters"], start=1)]
    arguments: dict[str, Any] = {"adapters": [entry.adapter for entry in entries]}
    if any(entry.name is not None for entry in entries):
        arguments["task_names"] = [entry.name for entry in entries]
    if any(entry.weight is not None for entry in entries):
        arguments["weights"] = [1.0 if entry.weight is None else entry.weight for entry in entries]
    options = content.get("options") or {}
    if not isinstance(options, dict):
        raise RecipeError("`options` must map names of options to values.")
    known = [*(option.name for option in fields(MergeOptions)), *_FURTHER]
    _check_keys(options, tuple(known), "`options`")
    if "weights" in options and "weights" in arguments:
        raise RecipeError("give the weights either by adapter (`weight`) or by task (`options: weights`).")
    given = {name: value for name, value in options.items() if value is not None}
    arguments |= {name: _read_further(name, given.pop(name)) for name in _FURTHER if name in given}
    chosen = MergeOptions.read(given)
    return arguments | {name: getattr(chosen, name) for name in given}


@dataclass(frozen=True)
class _Entry:
    """An adapter of a recipe."""

    adapter: str  # as merging takes it
    name: str | Sequence[str] | None = None
    weight: float | None = None


def _entry(entry: Any, place: int, folder: Path) -> _Entry:
    where = f"adapter {place}"
    if isinstance(entry, str):
        entry = {"adapter": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("adapter"), str):
        raise RecipeError(f"{where} must be a folder or Hub id, or a mapping with one under `adapter`.")
    _check_keys(entry, ("adapter", "revision", "weight", "name"), where)
    weight = number(f"the weight of {where}", entry["weight"]) if "weight" in entry else None
    if "name" in entry and not isinstance(entry["name"], str) and not are_names(entry["name"]):
        raise RecipeError(f"the name of {where} must be a string, or a list of them for a merge.")
    return _Entry(_place_of(entry["adapter"], entry.get("revision"), where, folder), entry.get("name"), weight)


def _place_of(adapter: str, revision: Any, where: str, folder: Path) -> str:
    """The folder, which may be beside the recipe, or the Hub id of an entry, with its revision."""
    beside = folder / Path(adapter).expanduser()
    if beside.is_dir():
        if revision is not None:
            raise RecipeError(f"{where}, '{adapter}', is a folder, which has no `revision`.")
        return str(beside)
    if revision is None:
        return adapter
    if "@" in adapter:
        raise RecipeError(f"{where}, '{adapter}', names its revision twice.")
    return f"{adapter}@{revision}"


def _check_keys(found: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    unknown = next((key for key in found if key not in known), None)
    if unknown is not None:
        raise RecipeError(f"{where} knows no `{unknown}`; it knows {', '.join(f'`{key}`' for key in known)}.")


def _read_further(name: str, value: Any) -> Any:
    """What is no field of `MergeOptions`."""
    if name == "device" and not isinstance(value, str):
        raise RecipeError(f"`device` must be a string, but it is {value!r}.")
    if name == "same_base" and not isinstance(value, bool):
        raise RecipeError(f"`same_base` must be true or false, but it is {value!r}.")
    if name == "without" and not are_names(value):
        raise RecipeError(f"`without` must be a list of tasks' names, but it is {value!r}.")
    if name != "weights":
        return value
    if not isinstance(value, dict) or not are_names(list(value)):
        raise RecipeError(f"`weights` must map tasks' names to numbers, but it is {value!r}.")
    return {task: number(f"the weight of '{task}'", weight) for task, weight in value.items()}
