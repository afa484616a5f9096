"""The merge that a server was told to route by: its record and the tensors of its projectors, read without PEFT."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from ..records import INSTRUCTION_ROUTER, MergeRecord
from ..records.options import IMAGES

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
KEY_PREFIX = "base_model.model."  # PEFT's, of the names of all tensors
LARGEST_CONFIG = 16 << 20  # bytes


@dataclass(frozen=True)
class ServedMerge:
    """A merge with routed projectors, or whose gates go by instructions.

    Args:
        folder (`Path`): Where it is.
        record ([`MergeRecord`]): How it was made.
    """

    folder: Path
    record: MergeRecord

    @classmethod
    def read(cls, source: Any) -> ServedMerge:
        """Of a folder or Hub id (`"me/merged@revision"` too); a `ValueError` says why it cannot be routed by.

        Example:

            ```py
            >>> from peft_many.serving.merge import ServedMerge

            >>> ServedMerge.read("merged").record.names
            ['clevr', 'iconqa']
            ```
        """
        if not isinstance(source, str) or not source:
            raise ValueError(f'"peft_many" must name the folder or Hub id of a merge, but it is {source!r:.80}.')
        folder = Path(source).expanduser()
        if not folder.is_dir():
            name, _, revision = source.partition("@")
            try:
                names = [CONFIG_NAME, WEIGHTS_NAME]
                folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=names))
            except (OSError, ValueError) as error:
                first = str(error).strip().partition("\n")[0]
                raise ValueError(f"'{source}' is no folder, and cannot be fetched from the Hub: {first}") from None
        missing = next((name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()), None)
        if missing is not None:
            raise ValueError(f"'{source}' is no merge: it has no {missing}.")
        return cls(folder, _routable(source, _record_in(folder / CONFIG_NAME, source)))

    def projector_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The experts and prototypes of its routed projectors, by their names in the base model."""
        yield from self._tensors_within(*self.record.routing)

    def instruction_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The prototypes of its router of instructions and their metric, by their last names."""
        for name, tensor in self._tensors_within(INSTRUCTION_ROUTER):
            yield name.rpartition(".")[-1], tensor

    def _tensors_within(self, *modules: str) -> Iterator[tuple[str, Tensor]]:
        within = tuple(f"{KEY_PREFIX}{name}." for name in modules)
        with safe_open(self.folder / WEIGHTS_NAME, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                if key.startswith(within):
                    yield key.removeprefix(KEY_PREFIX), file.get_tensor(key)


@functools.cache
def served_merge(told: str) -> ServedMerge:
    """The merge that a server was told, read once: what was loaded from it does not change while it is served."""
    return ServedMerge.read(told)


def _record_in(path: Path, source: str) -> MergeRecord:
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"'{source}': {CONFIG_NAME} is larger than {LARGEST_CONFIG >> 20} MiB.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        merge = content.get("merge") if content.get("peft_type") == "MANY" else None
        if merge is None:
            raise ValueError("it is the adapter of one task, or another method's")
        return MergeRecord.read(merge)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"'{source}' is no merge that can be routed by: {error!s:.300}.") from None


def _routable(source: str, record: MergeRecord) -> MergeRecord:
    if not record.is_routed:
        raise ValueError(
            f"'{source}' routes no projector, and no gate of it goes by instructions: serve it as a plain LoRA or "
            'model, without "peft_many".'
        )
    if record.routing and record.options.route_by not in (None, IMAGES):
        raise ValueError(
            f"The projectors of '{source}' go by instructions (`route_by={record.options.route_by!r}`). A server "
            "does not know these when it encodes an image, which it does once for all prompts. Merge with "
            '`route_by="images"`.'
        )
    return record
