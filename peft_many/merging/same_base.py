"""Whether adapters were trained on one base model: its weights say so, whatever each adapter calls it."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from peft.utils import PeftWarning
from safetensors import SafetensorError

from ..files.adapter import Adapter
from ..files.card import is_repo_id
from ..files.errors import UnmergeableAdapterError
from ..files.tensor_file import TensorFile

_CONFIG = "config.json"
# What may differ between the configs of two copies of a model.
_SAYS_NOTHING = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_SAMPLED = 1000  # tensors of which a piece is compared, at random, as a fine-tuned copy may differ in a few only
_PIECE = 4096  # bytes


def check_same_base(
    adapters: Sequence[Adapter], same_base: bool, is_at_hand: bool, cache_dir: str | Path | None = None
) -> None:
    """Refuse adapters whose base models are known to differ, and warn of those that may be different ones.

    With the model at hand its modules and shapes decide, so that is only a warning, and doubts are none.
    """
    if same_base:
        return
    doubts = [
        *_doubts_of_named(adapters, is_at_hand, cache_dir),
        *([] if is_at_hand else _doubts_of_unnamed(adapters)),
    ]
    if doubts:
        warnings.warn(doubts[0], PeftWarning, stacklevel=2)


def _doubts_of_named(adapters: Sequence[Adapter], is_at_hand: bool, cache_dir: str | Path | None) -> Iterator[str]:
    """What speaks against one base model, where adapters call theirs differently."""
    found: dict[str, Adapter] = {}
    for adapter in adapters:
        name, revision = _named(adapter)
        if name:
            found.setdefault(_identity(name, revision, cache_dir), adapter)
    if len(found) < 2:
        return
    (place, first), *others = sorted(found.items(), key=lambda item: not os.path.isdir(item[0]))
    for other_place, other in others:
        same, reason = _compare(Path(place), Path(other_place))
        said = f"{_trained(first)} and {_trained(other)}; {reason}"
        if same is False and is_at_hand:
            yield f"The adapters were trained on different base models: {said}."
        elif same is False:
            raise UnmergeableAdapterError(
                f"The adapters were trained on different base models: {said}. If they belong together nevertheless, "
                "say so by `same_base=True` (`--same-base`)."
            )
        elif same is None and not is_at_hand:
            yield _doubt(said)


def _doubts_of_unnamed(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Of adapters that do not name their base model, and share no layer, whose shape would tell, with another."""
    parts = [{name for task in one.tasks for name in (*task.deltas, *task.projectors)} for one in adapters]
    for i, adapter in enumerate(adapters):
        others = [theirs for j, theirs in enumerate(parts) if j != i]
        if others and not _named(adapter)[0] and all(parts[i].isdisjoint(theirs) for theirs in others):
            yield _doubt(f"{adapter.tasks[0].source} names none, and has no layer in common with the others")


def _doubt(said: str) -> str:
    return (
        f"The adapters may have been trained on different base models: {said}. If these are the same, say so by "
        "`same_base=True` (`--same-base`, or `same_base: true` in a recipe); if not, the merge is of no use."
    )


def base_of(adapters: Sequence[Adapter]) -> tuple[str | None, str | None]:
    """What a merge calls its base model, and its revision: a name on the Hub before a folder, and what most say."""
    names = Counter(_named(adapter) for adapter in adapters)
    del names["", None]

    def order(named: tuple[str, str | None]) -> tuple[Any, ...]:
        name, revision = named
        path, is_hub_id = os.path.expanduser(name), "/" in name and _is_on_hub(name)
        found = not is_hub_id, not os.path.isdir(path), not os.path.isabs(path), revision is None
        return *found, -names[named], name, revision

    return min(names, key=order, default=(None, None))


def _named(adapter: Adapter) -> tuple[str, str | None]:
    """What an adapter calls its base model, nothing if it does not say, and the revision."""
    name, revision = adapter.config.base_model_name_or_path, adapter.config.revision
    if not name or not isinstance(name, str):
        return "", None
    return name, revision if revision and isinstance(revision, str) else None


def _trained(adapter: Adapter) -> str:
    return f"{adapter.tasks[0].source} on '{'@'.join(filter(None, _named(adapter)))}'"


def _identity(name: str, revision: str | None, cache_dir: str | Path | None) -> str:
    """The real path of a base model's folder, in the Hub's cache too, or its name on the Hub with the revision."""
    if _is_on_hub(name):
        cached = try_to_load_from_cache(name, _CONFIG, cache_dir=cache_dir, revision=revision)
        if not isinstance(cached, str):
            return f"{name.lower()}@{revision or 'main'}"  # no two repositories differ in case alone
        name = os.path.dirname(cached)
    path = os.path.abspath(os.path.expanduser(name))
    return os.path.realpath(path) if os.path.isdir(path) else path


def _is_on_hub(name: str) -> bool:
    """Whether a name can only be that of a Hub repository."""
    return is_repo_id(name) and not os.path.isdir(os.path.expanduser(name))


def _compare(one: Path, other: Path) -> tuple[bool | None, str]:
    """Whether two folders hold the same model, as far as a bounded sample tells; `None` if it cannot tell, and why."""
    if not (one.is_dir() and other.is_dir()):
        return None, "they are not both here to be compared"
    mine, theirs = _tensors_in(one), _tensors_in(other)
    common = sorted({*mine} & {*theirs})
    for key in common:
        shapes = mine[key].shape(key), theirs[key].shape(key)
        if shapes[0] != shapes[1]:
            return False, f"their '{key}' has shape {shapes[0]} and {shapes[1]}"
    alike = [key for key in common if mine[key].dtype(key) == theirs[key].dtype(key)]
    for key in random.Random(0).sample(alike, min(_SAMPLED, len(alike))):
        if mine[key].piece(key, _PIECE) != theirs[key].piece(key, _PIECE):
            return False, f"their '{key}' differs"
    if not alike or len(alike) < max(len(mine), len(theirs)):
        return None, "their files cannot be compared tensor by tensor"
    option = next(_differing_options(*(_config_in(folder) for folder in (one, other))), None)
    return (True, "") if option is None else (None, f"their weights are alike, but `{option}` in {_CONFIG} is not")


def _tensors_in(folder: Path) -> dict[str, TensorFile]:
    """By tensor, the file that it is in; nothing where a file cannot be read."""
    found: dict[str, TensorFile] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            file = TensorFile(path)
            found |= {key: file for key in file if file.dtype(key)}
        except (OSError, SafetensorError, TypeError):
            return {}
    return found


def _config_in(folder: Path) -> Any:
    try:
        return json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _differing_options(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """What two configs both say, but differently; versions of transformers write more or fewer of the defaults."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        if one != other:
            yield name
        return
    for key in one:
        if key in other and not key.startswith("_") and key not in _SAYS_NOTHING:
            yield from _differing_options(one[key], other[key], f"{name}.{key}".removeprefix("."))
