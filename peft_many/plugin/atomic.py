"""Files and folders that are written whole or not at all: first under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
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
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder, which becomes `path` when the block ends well; folders above it are made as needed.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
        OSError: It cannot be created. That is found out before the block runs.
    """
    path = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"The output folder '{path}' already exists and is not empty; nothing was written.")
    # On the same file system as `path`, and nothing else is created until the block has ended.
    above = next(parent for parent in path.parents if parent.exists())
    try:
        temporary = Path(tempfile.mkdtemp(dir=above, prefix=f".{path.name}.", suffix=".partial"))
    except OSError as error:
        raise type(error)(f"The output folder '{path}' cannot be created: '{above}': {error.strerror}.") from None
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)  # An empty folder in the way is replaced, anything else refused.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
