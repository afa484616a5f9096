"""Files and folders that are written whole or not at all: first in a hidden place beside their own, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from peft.utils import CONFIG_NAME

from .processes import Processes, several_run


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what was written there replaces `path` when the block ends well."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less what the user's mask takes off
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, replaced: Collection[str] = ()) -> Iterator[Path]:
    """Give an empty folder that becomes `path` when the block ends well; folders above it are made as needed.

    What lies in `path` beside files that are `replaced` stays there, a trainer's files beside an adapter's say. After
    an error or Ctrl-C nothing is left. A process that is killed leaves a hidden folder beside `path`, which the next
    call for this path removes. That `path` cannot be created, holds something and nothing that is `replaced`, or is
    being written by another process, is found out before the block runs.
    """
    path = writable_place(path, replaced)
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        with _reserved(path) as hidden:
            new = hidden / "new"
            shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
            new.mkdir()
            yield new
            writable_place(path, replaced)  # again: somebody may have put something there
            if replaced:
                _keep_others(path, new, replaced)
                replace_folder(new, path)
            else:
                os.replace(new, path)  # an empty folder in the way is replaced, anything else refused
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):  # of those that hold something now
                parent.rmdir()


@contextlib.contextmanager
def shared_folder(path: Path, replaced: Collection[str], processes: Processes) -> Iterator[Path]:
    """As [`new_folder`], one for several processes. They must all enter and leave, and fail only together inside."""
    with contextlib.ExitStack() as stack:
        yield processes.in_one(lambda: stack.enter_context(new_folder(path, replaced)))
        processes.in_one(stack.close)


@contextlib.contextmanager
def _reserved(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` that no other process has at the same time."""
    hidden = path.parent / f".{path.name}.partial"
    above = next(parent for parent in path.parents if parent.exists())
    try:
        hidden.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"The output folder '{path}' cannot be created: '{above}': {error.strerror}.") from None
    lock = FileLock(hidden / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(f"Another process is writing '{path}'.{_hint()}") from None
    try:
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        lock.release()


def writable_place(path: Path, replaced: Collection[str] = ()) -> Path:
    """Where a new folder really goes, or `FileExistsError` if there is something, but no file that is `replaced`."""
    path = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"The output folder '{path}' is a file; nothing was written.")
    found = sorted(inside.name for inside in path.iterdir()) if path.exists() else []
    if found and not replaced:
        raise FileExistsError(
            f"The output folder '{path}' already exists and is not empty; nothing was written. Give another "
            f"folder.{_hint()}"
        )
    if found and not any((path / name).is_file() for name in replaced):
        raise FileExistsError(
            f"The output folder '{path}' holds '{found[0]}' and no adapter to replace; nothing was written. Give "
            "another folder."
        )
    return path


def _keep_others(path: Path, new: Path, replaced: Collection[str]) -> None:
    """Put all that is in `path` into `new` too, but what is `replaced`; nothing is moved before `new` is complete."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if name in replaced or (new / name).exists()} if folder == str(path) else set()

    def link(source: str, place: str) -> None:
        try:
            os.link(source, place, follow_symlinks=False)
        except OSError:  # the file system has no links
            shutil.copy2(source, place, follow_symlinks=False)

    if path.exists():
        shutil.copytree(path, new, symlinks=True, ignore=left_out, copy_function=link, dirs_exist_ok=True)


def check_apart(
    output: Path, inputs: Iterable[Any], may_replace: Callable[[Path], bool] = lambda folder: False
) -> None:
    """Fail if an output folder is one of the inputs that it may not replace."""
    place = Path(os.path.realpath(output))
    for given in inputs:
        if not isinstance(given, (str, os.PathLike)):
            continue  # a model in memory
        folder = Path(os.path.realpath(Path(given).expanduser()))
        if folder == place and folder.is_dir() and not may_replace(folder):
            called = "" if str(given) == str(output) else f" as '{given}'"
            raise FileExistsError(
                f"The output folder '{output}' is also an input{called}; nothing was written. Give another folder."
            )


def results_folder(
    output_dir: str | os.PathLike[str], files: Collection[str], overwrite: bool, inputs: Iterable[Any] = ()
) -> Path:
    """A folder to write files into, or an `OSError`: it is an input, cannot be written, or holds some unasked.

    It need not be there, and is not made. What else is in it may stay there.
    """
    output = Path(output_dir).expanduser()
    check_apart(output, inputs)
    path = output.absolute()
    above = next(place for place in (path, *path.parents) if place.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"The output folder '{path}' cannot be created: '{above}' is a file.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"Nothing can be written into the output folder '{path}': '{above}': Permission denied.")
    if (path / CONFIG_NAME).exists():
        raise FileExistsError(f"The output folder '{path}' is an adapter's; nothing was written. Give another folder.")
    earlier = next((name for name in files if (path / name).exists()), None)
    if earlier is not None and not overwrite:
        raise FileExistsError(
            f"The output folder '{path}' already holds '{earlier}'; nothing was written. To replace earlier results: "
            "`overwrite=True`, or `--overwrite`."
        )
    return output


def _hint() -> str:
    """What may be the reason why somebody else's folder is in the way."""
    if not several_run():
        return ""
    return (
        " Several processes run here: only one of them may make this call (`if accelerator.is_main_process:`), or, "
        "where there is `across_processes=True`, all of them with that."
    )


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
