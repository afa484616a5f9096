"""Hashes of adapters' weights files, by which a merge's record knows its tasks again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_CHUNK = 1 << 20


def sha256_of_each(files: Sequence[Path]) -> list[str]:
    """Hashes of files that are read at the same time, as many as there are cores.

    Hashing releases Python's lock, and one file after another would take a quarter of a merge on a GPU.
    """
    with ThreadPoolExecutor(os.cpu_count(), "peft_many hashes") as executor:
        return list(executor.map(sha256_of, files))


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
