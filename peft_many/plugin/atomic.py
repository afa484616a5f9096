"""Files that are written whole or not at all: first under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what was written there replaces `path` when the block ends well."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, default_mode(0o666))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def writable_place(path: Path) -> tuple[Path, Path]:
    """Where a new folder really goes, and the nearest folder above it that exists, on the same file system.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    path = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"The output folder '{path}' is a file; nothing was written.")
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"The output folder '{path}' already exists and is not empty; nothing was written.")
    return path, next(parent for parent in path.parents if parent.exists())


def default_mode(mode: int) -> int:
    """The mode that a file or folder gets which is created with `mode`, as the user's mask says."""
    mask = os.umask(0)  # which can only be read by setting it
    os.umask(mask)
    return mode & ~mask
