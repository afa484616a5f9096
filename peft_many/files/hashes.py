"""Hashes of adapters' weights files, by which a merge's record knows its tasks again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from .adapter import Adapter

_CHUNK = 1 << 20


def with_hashes(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with the hashes of their weights files in their origins; the tasks of merges have theirs already.

    Files are read at the same time, as many as there are cores: hashing releases Python's lock, and one after another
    would take a quarter of a merge on a GPU.
    """
    with ThreadPoolExecutor(os.cpu_count(), "peft_many hashes") as executor:
        return list(executor.map(_with_hash, adapters))


def _with_hash(adapter: Adapter) -> Adapter:
    if adapter.merge is not None:
        return adapter
    digest = hashlib.sha256()
    with open(adapter.weights_path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    tasks = [replace(task, origin=replace(task.origin, sha256=digest.hexdigest())) for task in adapter.tasks]
    return replace(adapter, tasks=tuple(tasks))
