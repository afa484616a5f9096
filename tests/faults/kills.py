"""Kills a process at a chosen file operation: deterministic, and at every operation if need be."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import tqdm.auto
import transformers.modeling_utils

import peft_many.files.source
from peft_many.files.tensor_file import TensorFileWriter
from tests.adapters import files

_WRITING = os.O_WRONLY | os.O_RDWR
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree")


class _Watch:
    """Counts the operations that change something below a folder, and dies at one of them."""

    def __init__(self, root: Path, at: int, torn: bool) -> None:
        self.root, self.at, self.torn = str(root), at, torn
        self.count = 0
        self.dying = False

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(self.root):
            if arguments[2] & _WRITING:
                self.note(lambda: _tear(arguments[0], arguments[2]))
        elif event in _CHANGES and str(arguments[0]).startswith(self.root):
            self.note(lambda: None)

    def note(self, tear: Callable[[], Any]) -> None:
        """An operation is about to happen; `tear` does half of it."""
        if self.dying:
            return
        self.count += 1
        if self.count == self.at:
            self.dying = True
            if self.torn:
                tear()
            os.kill(os.getpid(), signal.SIGKILL)


def _tear(path: str, flags: int) -> None:
    """What a file may be like while it is being written."""
    if flags & os.O_TRUNC:
        Path(path).write_bytes(b'{"half": [1, 2')


# Whoever writes a safetensors file by a call into Rust, which is no event for Python.
_SAVERS = (
    (peft.peft_model, "safe_save_file"),
    (transformers.modeling_utils, "safe_save_file"),
    (peft_many.files.source, "save_file"),
)


def _watch_writers(watch: _Watch) -> None:
    write = TensorFileWriter.write

    def torn_write(self: TensorFileWriter, key: str, tensor: Any) -> None:
        def tear() -> None:
            write(self, key, tensor)
            self._file.seek(-tensor.nbytes // 2, os.SEEK_CUR)
            self._file.write(b"\xff" * (tensor.nbytes // 2))
            self._file.flush()

        watch.note(tear)
        write(self, key, tensor)

    TensorFileWriter.write = torn_write  # type: ignore[method-assign]
    for module, name in _SAVERS:
        setattr(module, name, _torn(getattr(module, name), watch))


def _torn(save: Callable[..., None], watch: _Watch) -> Callable[..., None]:
    def torn_save(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        def tear() -> None:
            save(tensors, path, *args, **kwargs)
            os.truncate(path, os.path.getsize(path) // 2)

        watch.note(tear)
        save(tensors, path, *args, **kwargs)

    return torn_save


def killed_at(operation: int, action: Callable[[], Any], root: Path, *, torn: bool = False) -> bool:
    """Do something in a process that dies at its n-th change below a folder; says whether it came that far.

    Args:
        operation (`int`): Counted from 1.
        action (`Callable`): What to do.
        root (`Path`): The folder.
        torn (`bool`): Whether half of the fatal operation is still done.
    """
    return os.WIFSIGNALED(_forked(action, _Watch(root, operation, torn))[0])


def operations(action: Callable[[], Any], root: Path) -> int:
    """How many changes below a folder something makes."""
    status, count = _forked(action, _Watch(root, -1, False))
    assert status == 0, "the action fails even if nobody disturbs it"
    return count


def _forked(action: Callable[[], Any], watch: _Watch) -> tuple[int, int]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _leave_locks_alone()
            _watch_writers(watch)
            sys.addaudithook(watch.audit)
            action()
            os.write(writing, str(watch.count).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:  # also where printing fails, on a disk that is full: nothing of the test run may go on in here
            os._exit(1)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reading) as pipe:
        return status, int(pipe.read() or 0)


def _leave_locks_alone() -> None:
    """tqdm's lock is shared with processes that were forked off; who is killed holding it would stop the others."""
    for kind in {tqdm.tqdm, tqdm.auto.tqdm}:  # either may have a lock of its own
        kind.set_lock(threading.RLock())


def killed_after(seconds: float, action: Callable[[], Any]) -> None:
    """Do something in a process that is killed some time after it began, if it is not done by then."""
    pid = os.fork()
    if pid == 0:
        _leave_locks_alone()
        signal.setitimer(signal.ITIMER_REAL, seconds)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process without a last word
        try:
            action()
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(pid, 0)


def assert_next_succeeds(output: Path, action: Callable[[], Any], expected: dict[str, bytes], where: Any) -> None:
    """After a kill the folder is whole or not there; the next run makes it, and nothing hidden is left beside it."""
    if output.exists() and files(output):
        assert files(output) == expected, where
        if len(list(output.parent.iterdir())) > 1:  # it was killed between giving the folder its name and cleaning up
            shutil.rmtree(output)
    if not output.exists() or not files(output):
        action()
    assert files(output) == expected, where
    assert [path.name for path in output.parent.iterdir()] == [output.name], where
