"""Recipes: long lists of adapters with their weights, revisions, names and options, in a YAML file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ..methods import LPM, METHODS, MergeMethod
from ..tuner.config import ROUTERS
from .plan import MEAN, ROUTED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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

    `options` knows `method`, `projectors`, `ridge`, `router`, `temperature`, `top_k`, `abstain_above`, `rank`,
    `gate_lora`, `dtype`, `device`, `without` (a list of tasks) and `weights` (by task name, in place of every
    `weight`).

    Args:
        path (`str`): The file. Folders in it are relative to where it is.

    Returns:
        `dict[str, Any]`: Use it as `merge_adapter_files(**read_recipe(path), output_dir=...)`.

    Raises:
        FileNotFoundError: There is no such file.
        RecipeError: It is no recipe.
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
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def _arguments(content: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(content, dict) or not isinstance(content.get("adapters"), list) or not content["adapters"]:
        raise RecipeError("a recipe needs a list of `adapters`.")
    _check_keys(content, ("adapters", "options"), "a recipe")
    entries = [_entry(entry, i, folder) for i, entry in enumerate(content["adapters"], start=1)]
    arguments: dict[str, Any] = {"adapters": [entry["adapter"] for entry in entries]}
    if any("name" in entry for entry in entries):
        arguments["task_names"] = [entry.get("name") for entry in entries]
    if any("weight" in entry for entry in entries):
        arguments["weights"] = [entry.get("weight", 1.0) for entry in entries]
    options = content.get("options") or {}
    if not isinstance(options, dict):
        raise RecipeError("`options` must map names of options to values.")
    _check_keys(options, tuple(_OPTIONS), "`options`")
    if "weights" in options and "weights" in arguments:
        raise RecipeError("give the weights either by adapter (`weight`) or by task (`options: weights`).")
    for name, value in options.items():
        if value is not None:
            arguments[name] = _OPTIONS[name](name, value)
    return arguments


def _entry(entry: Any, number: int, folder: Path) -> dict[str, Any]:
    where = f"adapter {number}"
    if isinstance(entry, str):
        entry = {"adapter": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("adapter"), str):
        raise RecipeError(f"{where} must be a folder or Hub id, or a mapping with one under `adapter`.")
    _check_keys(entry, ("adapter", "revision", "weight", "name"), where)
    found = dict(entry)
    name, revision = found["adapter"], found.pop("revision", None)
    beside = folder / Path(name).expanduser()
    if beside.is_dir():
        if revision is not None:
            raise RecipeError(f"{where}, '{name}', is a folder, which has no `revision`.")
        found["adapter"] = str(beside)
    elif revision is not None:
        if "@" in name:
            raise RecipeError(f"{where}, '{name}', names its revision twice.")
        found["adapter"] = f"{name}@{revision}"
    if "weight" in found:
        found["weight"] = _number(f"the weight of {where}", found["weight"])
    if "name" in found and not isinstance(found["name"], str):
        names = found["name"]
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise RecipeError(f"the name of {where} must be a string, or a list of them for a merge.")
    return found


def _check_keys(found: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    unknown = next((key for key in found if key not in known), None)
    if unknown is not None:
        raise RecipeError(f"{where} knows no `{unknown}`; it knows {', '.join(f'`{key}`' for key in known)}.")


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)  # YAML takes 1e-4 for a string
    except (TypeError, ValueError):
        raise RecipeError(f"{name} must be a number, but it is {value!r}.") from None


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RecipeError(f"`{name}` must be a whole number, but it is {value!r}.")
    return value


def _yes_or_no(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"`{name}` must be true or false, but it is {value!r}.")
    return value


def _names(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise RecipeError(f"`{name}` must be a list of tasks' names, but it is {value!r}.")
    return value


def _weights(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or not all(isinstance(task, str) for task in value):
        raise RecipeError(f"`{name}` must map tasks' names to numbers, but it is {value!r}.")
    return {task: _number(f"the weight of '{task}'", weight) for task, weight in value.items()}


def _one_of(*known: str) -> Callable[[str, Any], str]:
    def read(name: str, value: Any) -> str:
        if value not in known:
            raise RecipeError(f"`{name}` must be one of {', '.join(known)}, but it is {value!r}.")
        return value

    return read


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"`{name}` must be a string, but it is {value!r}.")
    return value


def _method(name: str, value: Any) -> str | MergeMethod:
    if isinstance(value, str):
        return _one_of(LPM, *METHODS)(name, value)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise RecipeError(f"`{name}` must be a name, or a mapping with one under `name`, but it is {value!r}.")
    options = {key: option for key, option in value.items() if key != "name"}
    method = METHODS.get(value["name"])
    if method is None or not options:
        _one_of(*METHODS, *([] if options else [LPM]))(name, value["name"])
        return value["name"]
    try:
        return method(**options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"`{name}`: {str(error).removeprefix(f'{method.__name__}.__init__() ')}") from None


_OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "method": _method,
    "projectors": _one_of(ROUTED, MEAN),
    "ridge": lambda name, value: _number(f"`{name}`", value),
    "router": _one_of(*ROUTERS),
    "temperature": lambda name, value: _number(f"`{name}`", value),
    "top_k": _whole,
    "abstain_above": lambda name, value: _number(f"`{name}`", value),
    "rank": _whole,
    "gate_lora": _yes_or_no,
    "dtype": lambda name, value: DTYPES[_one_of(*DTYPES)(name, value)],
    "device": _text,
    "without": _names,
    "weights": _weights,
}
