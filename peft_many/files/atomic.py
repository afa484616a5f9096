"""Files that are written whole or not at all: first under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
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


def writable_place(path: Path, replaced: Collection[str] = ()) -> tuple[Path, Path]:
    """Where a new folder really goes, and the nearest folder above it that exists, on the same file system.

    Args:
        path (`Path`): The new folder.
        replaced (`Collection[str]`): Names of files that may be in it already, and will be gone.

    Raises:
        FileExistsError: `path` exists and is not an empty folder, or holds others than these.
    """
    path = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"The output folder '{path}' is a file; nothing was written.")
    if path.exists():
        found = sorted(inside.name for inside in path.iterdir())
        if found and not replaced:
            raise FileExistsError(f"The output folder '{path}' already exists and is not empty; nothing was written.")
        strange = next((name for name in found if name not in replaced or not (path / name).is_file()), None)
        if strange is not None:
            raise FileExistsError(
                f"The output folder '{path}' holds '{strange}', which is no file of an adapter and would be lost; "
                "nothing was written."
            )
    return path, next(parent for parent in path.parents if parent.exists())


def replace_folder(new: Path, path: Path) -> None:
    """Give a folder the name `path`; one that is there is exchanged for it in one step and removed.

    Where the system cannot exchange two names there is a moment in which `path` does not exist.
    """
    if not path.exists() or not any(path.iterdir()):
        os.replace(new, path)
        return
    if _exchange(new, path):
        old = new
    else:
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
        os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            os.replace(old, path)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Swap two names in one step, with Linux's `renameat2`; `False` where that is not known."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0


def default_mode(mode: int) -> int:
    """The mode that a file or folder gets which is created with `mode`, as the user's mask says."""
    mask = os.umask(0)  # which can only be read by setting it
    os.umask(mask)
    return mode & ~mask
