"""A folder that is written over a long time: beside its place, with a journal, so that it can be gone on with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from .atomic import default_mode, replace_folder, writable_place
from .processes import ProcessFailedError, current_processes, fail_together, from_every_process

_LOCK = ".lock"
_JOURNAL = ".journal-"
Step = TypeVar("Step")
T = TypeVar("T")


@dataclass(frozen=True)
class PartialFolder:
    """A folder under construction, and what of it is done.

    Args:
        folder (`Path`): Where to write.
        done (`dict[str, Any]`): What an interrupted run recorded, by step.
        process (`int`): Who writes, counted from 0; each process has a journal of its own.
        processes (`int`): How many processes write.
    """

    folder: Path
    done: dict[str, Any]
    process: int = 0
    processes: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.process == 0

    def wait(self) -> None:
        """Wait until all processes have come this far.

        Raises:
            ProcessFailedError: One of them failed.
        """
        if self.processes > 1:
            fail_together(None)

    def agree(self, value: T) -> T:
        """The first process's value, in every process."""
        return value if self.processes == 1 else from_every_process(value)[0]

    def share(self, steps: Sequence[Step], cost: Callable[[Step], float]) -> list[Step]:
        """This process's share of the steps; everyone's costs about the same."""
        if self.processes == 1:
            return list(steps)
        loads, mine = [0.0] * self.processes, []
        for step in sorted(steps, key=cost, reverse=True):
            idlest = loads.index(min(loads))
            loads[idlest] += cost(step)
            if idlest == self.process:
                mine.append(step)
        return mine

    def record(self, step: str, result: Any) -> None:
        """Note that a step is done. What it wrote must have been handed to the operating system."""
        with open(self.folder / f"{_JOURNAL}{self.process}", "a", encoding="utf-8") as journal:
            journal.write("\n" + json.dumps([step, result]) + "\n")  # the line before may have been cut off

    def recorded(self) -> dict[str, Any]:
        """What all processes have recorded so far, earlier runs included."""
        return _recorded(self.folder)


def _recorded(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.glob(f"{_JOURNAL}*")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(TypeError, ValueError):  # a line that was cut off is a step that was not done
                step, result = json.loads(line)
                found[step] = result
    return found


@contextlib.contextmanager
def partial_folder(
    path: Path, key: str, kept: Collection[str] = (), replaced: Collection[str] = ()
) -> Iterator[PartialFolder]:
    """Give a folder beside `path` that becomes `path` when the block ends well; folders above it are made as needed.

    After an error it is removed. After an interruption (Ctrl-C, a kill) it stays, and the next call with the same
    `key` gets it again; a call with another key removes it.

    Args:
        path (`Path`): The final place.
        key (`str`): Names what is written, inputs and options.
        kept (`Collection[str]`): Files that an interrupted run may have begun; all others are begun anew.
        replaced (`Collection[str]`): Files that may be in `path`, which is replaced whole then.

    Raises:
        FileExistsError: `path` exists and is not an empty folder, or holds other files than these.
        BlockingIOError: Another process is writing the same thing there.
        OSError: It cannot be created. That is found out before the block runs.
    """
    path, above = writable_place(path, replaced)
    # Folders of one name may be missing in several places above which the same folder exists.
    key = hashlib.sha256(f"{key} {path}".encode()).hexdigest()[:12]
    name = f".{path.name}.{key}.partial"
    # A run that was killed after it had made the folders above left it farther up.
    folder = next((parent for parent in path.parents if os.path.isdir(parent / name)), above) / name
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise type(error)(f"The output folder '{path}' cannot be created: '{above}': {error.strerror}.") from None
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(f"Another process is merging the same adapters into '{path}'.") from None
    try:
        _remove_others(path, folder)
        for found in folder.iterdir():
            if found.is_dir():
                shutil.rmtree(found)
            elif found.name not in (*kept, _LOCK) and not found.name.startswith(_JOURNAL):
                found.unlink()
        yield PartialFolder(folder, _recorded(folder))
        lock.release()
        for extra in (*folder.glob(f"{_JOURNAL}*"), folder / _LOCK):
            extra.unlink(missing_ok=True)
        os.chmod(folder, default_mode(0o777))
        path.parent.mkdir(parents=True, exist_ok=True)
        if replaced:
            writable_place(path, replaced)  # again: somebody may have put something there
            replace_folder(folder, path)
        else:
            try:
                os.replace(folder, path)  # An empty folder in the way is replaced, anything else refused.
            except OSError:
                writable_place(path)  # which says so if something was put there meanwhile
                raise
    except Exception:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except BaseException:
        lock.release()
        if not _recorded(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def shared_folder(
    path: Path, key: str, kept: Collection[str] = (), replaced: Collection[str] = ()
) -> Iterator[PartialFolder]:
    """As `partial_folder`; where several processes run, one folder for all of them, which must all enter and leave.

    If one fails, all do.
    """
    state = current_processes()
    if state is None:
        with partial_folder(path, key, kept, replaced) as alone:
            yield alone
        return
    with contextlib.ExitStack() as stack:
        begun: PartialFolder | None = None
        error: Exception | None = None
        if state.is_main_process:
            try:
                begun = stack.enter_context(partial_folder(path, key, kept, replaced))
            except OSError as failure:
                error = failure
        fail_together(error)
        folder = from_every_process(begun and begun.folder)[0]
        try:
            yield PartialFolder(folder, _recorded(folder), state.process_index, state.num_processes)
        except ProcessFailedError:
            raise  # which everyone knows
        except Exception as failure:
            error = failure
        fail_together(error)
    from_every_process(None)  # until the first process has given the folder its name


def _remove_others(path: Path, mine: Path) -> None:
    """Remove what interrupted runs of other inputs left for this path, unless someone is at work there."""
    if mine.parent != path.parent:
        return  # folders above the path are missing, and others of its name may be on their way
    of_this_path = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{12}\.partial")
    for found in mine.parent.iterdir():
        if found != mine and found.is_dir() and of_this_path.fullmatch(found.name):
            lock = FileLock(found / _LOCK)
            with contextlib.suppress(Timeout), lock.acquire(timeout=0):
                shutil.rmtree(found, ignore_errors=True)
