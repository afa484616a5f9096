"""New Python processes for the tests, forked from one that has imported what is slow to import, and nothing of ours.

Importing torch, transformers and peft takes seconds, and dozens of tests want a process that has seen nothing of what
the test did. Each of theirs starts as a real one would but for that: `peft_many` is not imported yet, nothing is
registered, and working directory, environment, arguments and output are its own. What depends on how Python itself
starts, or on environment variables that libraries read when they are imported, needs `subprocess`.
"""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import multiprocessing.context
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers", "peft", "accelerate", "tests.new_process"])


def context() -> multiprocessing.context.ForkServerContext:
    """Where such processes come from, for an executor of `concurrent.futures`."""
    return _CONTEXT


class NewProcess:
    """A Python process that begins at once.

    Args:
        program (`str` or `Path`): The path of a script, or as a string what comes after `python -c`.
        arguments (`Any`): Those of the command line.
        cwd (`Path`, *optional*): Its working directory; by default ours.
        environment (`Mapping[str, str]`, *optional*): Its environment; by default ours.
    """

    def __init__(
        self,
        program: str | Path,
        *arguments: Any,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        environment = dict(os.environ if environment is None else environment)
        told = (program, list(map(str, arguments)), str(cwd or Path.cwd()), environment, self._folder.name)
        self._process = _CONTEXT.Process(target=_run, args=told)
        self._process.start()

    def wait(self, timeout: float) -> None:
        """Wait until it ends, or for that many seconds."""
        self._process.join(timeout)

    def end(self) -> subprocess.CompletedProcess[str]:
        """Kill it if it still runs; what it said, and its exit status, minus the number of a signal that ended it.

        One that still runs says where it is first, as `faulthandler` does.
        """
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, signal.SIGABRT)
            self._process.join(5)
        self._process.kill()
        self._process.join()
        status = self._process.exitcode
        assert status is not None
        out, err = (Path(self._folder.name, name).read_text() for name in ("out", "err"))
        self._folder.cleanup()
        return subprocess.CompletedProcess("python", status, out, err)


def run(
    program: str | Path, *arguments: Any, timeout: float = 300, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a script, or code, in a `NewProcess` until it ends; after the timeout it is killed."""
    return run_all([NewProcess(program, *arguments, **options)], timeout)[0]


def run_all(processes: list[NewProcess], timeout: float) -> list[subprocess.CompletedProcess[str]]:
    """Wait until all of them have ended; what runs after the timeout is killed."""
    end = time.monotonic() + timeout
    for process in processes:
        process.wait(max(0, end - time.monotonic()))
    return [process.end() for process in processes]


def both_ranks(program: str | Path, *arguments: Any) -> list[NewProcess]:
    """A script, or code, in two processes that find each other as those of `torchrun --nproc_per_node 2` do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = str(free.getsockname()[1])
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2))
    return [NewProcess(program, *arguments, environment={**os.environ, **place, **rank}) for rank in ranks]


def _run(program: str | Path, arguments: list[str], cwd: str, environment: dict[str, str], output: str) -> None:
    """Become what `python program arguments` would be."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(output, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False), line_buffering=True) for n in (1, 2))
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [str(program.parent) if isinstance(program, Path) else "", *paths]
    sys.argv = [str(program) if isinstance(program, Path) else "-c", *arguments]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), main.__dict__)
