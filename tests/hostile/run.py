"""Tries mutated adapters in a process of its own, whose memory is limited: `python -m tests.hostile.run FOLDER 0 300`.

Whatever is in the files, using them either works and gives finite numbers, or ends with one of the public errors; in
bounded time and memory, with nothing imported or started and nothing written beside the output folder. Most cases read
and merge files alone, which takes milliseconds; every tenth puts an adapter on a model.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import PeftModel

import peft_many
from peft_many import export_lora, inspect_adapter, merge_adapter_files, merge_adapter_sequence, merge_report
from peft_many.files import patterns
from peft_many.files.errors import StatisticsError, UnmergeableAdapterError
from peft_many.files.tensor_file import TensorFile
from tests.adapters import base, files
from tests.hostile.mutations import TRAP, mutate

MEMORY = 768 << 20  # bytes beyond what the process has before the first case
SECONDS = 30.0
PACKAGE = Path(peft_many.__file__).parent
PUBLIC = (UnmergeableAdapterError, StatisticsError)


class TooSlowError(BaseException):
    """A case took longer than `SECONDS`."""


def is_clear(error: BaseException, name: str) -> bool:
    """Whether users can tell from it what is wrong: one of our types; where PEFT loads, also PEFT's own words."""
    if isinstance(error, PUBLIC):
        return str(error).isprintable() and len(str(error)) > 20
    if name != "from_pretrained":
        return False
    if isinstance(error, KeyError) and "projector" in str(error):
        return False
    if "size mismatch for" in str(error):
        return isinstance(error, RuntimeError)
    if type(error) is ValueError:  # such as "`layers_pattern` cannot be used when `target_modules` is a str."
        return len(str(error)) > 20
    frames = traceback.extract_tb(error.__traceback__)
    ours = [Path(frame.filename).relative_to(PACKAGE) for frame in frames if PACKAGE in Path(frame.filename).parents]
    if Path("tuner/model.py") in ours:
        return isinstance(error, ValueError) and len(str(error)) > 20  # such as "No modules were targeted"
    # PEFT reads the type of the adapter by itself, and whom that leads to is no business of ours.
    return not ours or any(frame.name == "_get_peft_type" for frame in frames)


def merge_files(adapter: Path, good: dict[str, Path], output: Path) -> None:
    others = [] if adapter.name == "merge" else [good["c"]]
    merged = merge_adapter_files([adapter, *others], output / "merged", progress=False)
    assert_finite(merged)


def merge_on_base(adapter: Path, good: dict[str, Path], output: Path) -> None:
    model = copy.deepcopy(BASE)
    merged = merge_adapter_sequence(
        model, [adapter, *([] if adapter.name == "merge" else [good["c"]])], progress=False
    )
    for name, parameter in merged.named_parameters():
        assert torch.isfinite(parameter).all(), name


def report(adapter: Path, good: dict[str, Path], output: Path) -> None:
    merge_report(adapter, progress=False)


def load(adapter: Path, good: dict[str, Path], output: Path) -> None:
    PeftModel.from_pretrained(copy.deepcopy(BASE), adapter)


def assert_finite(folder: Path) -> None:
    file = TensorFile(folder / "adapter_model.safetensors")
    for key in file:
        assert torch.isfinite(file[key]).all(), key


def export(adapter: Path, good: dict[str, Path], output: Path) -> None:
    assert_finite(export_lora(adapter, output / "merged").folder)


def inspect(adapter: Path, good: dict[str, Path], output: Path) -> None:
    inspect_adapter(adapter)


@dataclass(frozen=True)
class Target:
    """Something to do with an adapter, how often, and with which."""

    call: Callable[[Path, dict[str, Path], Path], None]
    share: int
    kinds: tuple[str, ...]


MERGES = ("merge", "gated", "gaussian", "asked")
TARGETS = {
    "merge_adapter_files": Target(merge_files, 45, ("a", "merge", "lora", "gated", "asked")),
    "merge_report": Target(report, 15, ("merge", "gated", "gaussian", "asked")),
    "inspect_adapter": Target(inspect, 15, ("a", "merge", "lora", "gated", "gaussian")),
    "export_lora": Target(export, 15, ("a", "merge", "lora", "gated")),
    "merge_adapter_sequence": Target(merge_on_base, 3, ("a", "merge", "gated")),
    "from_pretrained": Target(load, 7, ("a", "merge", "gated", "gaussian", "asked")),
}


class Guard:
    """Notes what the files made this process do that no adapter may: unpickle, start programs, connect, write outside.

    Args:
        allowed (`Path`): The folder that may be written to.
    """

    _STARTS = ("os.system", "os.exec", "socket.connect", "pickle.find_class", "ctypes.dlopen")
    _RUNS = ("subprocess.Popen", "os.posix_spawn")  # how `subprocess` starts programs, the latter since Python 3.13
    _MOVES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.symlink", "os.link")

    def __init__(self, allowed: Path) -> None:
        self._allowed = os.path.realpath(allowed)
        self.seen: list[str] = []
        self.watching = False
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event == "open":
            if arguments[2] & (os.O_WRONLY | os.O_RDWR) and not self._is_inside(arguments[0]):
                self.seen.append(f"opened {arguments[0]} to write")
        elif event in self._MOVES:
            # The removal of a whole folder names what is in it by file descriptors; what was removed is looked for.
            if isinstance(arguments[-1], int) and arguments[-1] >= 0:
                return
            if not all(self._is_inside(path) for path in arguments if isinstance(path, (str, bytes, os.PathLike))):
                self.seen.append(f"{event} {arguments}")
        elif event in self._STARTS or (event in self._RUNS and patterns._TRIAL not in arguments[1]):
            self.seen.append(f"{event} {arguments}")

    def _is_inside(self, path: Any) -> bool:
        if isinstance(path, int) or os.fsdecode(path) == os.devnull:
            return True
        real = os.path.realpath(os.fsdecode(path))
        return real == self._allowed or real.startswith(self._allowed + os.sep)


class OncePerQuestion:
    """`subprocess` for the trials of regular expressions, asked the same only once: few differ, and some are slow."""

    def __init__(self) -> None:
        self._answers: dict[bytes, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def run(self, command: list[str], *, input: bytes, **options: Any) -> Any:
        if input not in self._answers:
            try:
                self._answers[input] = subprocess.run(command, input=input, **options)
            except subprocess.TimeoutExpired as error:
                self._answers[input] = error
        answer = self._answers[input]
        if isinstance(answer, subprocess.TimeoutExpired):
            raise answer
        return answer


def one_case(seed: int, root: Path, good: dict[str, Path], guard: Guard) -> tuple[str, str | None]:
    """Run a case; returns how it ended, and what was wrong about that."""
    random = Random(seed)
    (name,) = random.choices(list(TARGETS), [target.share for target in TARGETS.values()])
    kind = random.choice(TARGETS[name].kinds)
    sandbox = root / "sandbox"
    shutil.rmtree(sandbox, ignore_errors=True)
    (sandbox / "in").mkdir(parents=True)
    (sandbox / "out").mkdir()
    adapter = Path(shutil.copytree(good[kind], sandbox / "in" / ("merge" if kind in MERGES else kind)))
    what = mutate(adapter, random)
    before = files(sandbox / "in")
    label, wrong = f"{name}({kind}), {what}", None
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    if seed % 20 == 0:  # what hangs outside of Python; a thread is started each time, which takes as long as a case
        faulthandler.dump_traceback_later(4 * SECONDS, exit=True)
    guard.watching = True
    try:
        TARGETS[name].call(adapter, good, sandbox / "out")
        outcome = "worked"
    except (TooSlowError, MemoryError):
        outcome, wrong = "exhausted", traceback.format_exc()
    except Exception as error:
        outcome = type(error).__name__
        if "allocate" in str(error) or not is_clear(error, name):
            wrong = traceback.format_exc()
    finally:
        guard.watching = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    if guard.seen:
        wrong = "; ".join(guard.seen)
        guard.seen.clear()
    if TRAP in sys.modules:
        wrong = f"imported {TRAP}"
        del sys.modules[TRAP]
    left = {path.relative_to(sandbox).as_posix() for path in sandbox.rglob("*") if path.is_file()}
    expected = {f"in/{path}" for path in before}
    if outcome == "worked" and name in ("merge_adapter_files", "export_lora"):
        left = {path for path in left if not path.startswith("out/merged/")}
    if left != expected or files(sandbox / "in") != before:
        wrong = f"wrote or removed {sorted(left ^ expected)}"
    elif {path.name for path in root.iterdir()} - EXPECTED or os.listdir(root / "cwd") != [".seed"]:
        wrong = f"wrote outside: {list(root.iterdir())}"
    seconds = time.monotonic() - start
    return f"{name}: {outcome}", None if wrong is None else f"seed {seed}: {label}, {seconds:.1f} s\n{wrong}"


EXPECTED = {"sandbox", "good", "cwd", "modules"}
BASE: Any = None


def main(root: Path, first: int, count: int) -> None:
    global BASE
    torch.set_num_threads(1)
    patterns.SECONDS = 1.0
    patterns.subprocess = OncePerQuestion()  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(root / "modules"))
    (root / "modules").mkdir(exist_ok=True)
    (root / "modules" / f"{TRAP}.py").write_text("")
    (root / "cwd").mkdir(exist_ok=True)
    os.chdir(root / "cwd")
    good = {path.name: path for path in (root / "good").iterdir()}
    BASE = base("llava")
    for target in TARGETS.values():  # which also loads whatever is loaded late
        shutil.rmtree(root / "sandbox", ignore_errors=True)
        (root / "sandbox").mkdir()
        target.call(good[target.kinds[0]], good, root / "sandbox")
    guard = Guard(root / "sandbox" / "out")
    signal.signal(signal.SIGALRM, too_slow)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    outcomes: Counter[str] = Counter()
    failures = []
    started = time.monotonic()
    for seed in range(first, first + count):
        (root / "cwd" / ".seed").write_text(str(seed))  # for who wants to know where this process died
        outcome, wrong = one_case(seed, root, good, guard)
        outcomes[outcome] += 1
        if wrong is not None:
            failures.append(wrong)
    faulthandler.cancel_dump_traceback_later()
    shutil.rmtree(root / "sandbox", ignore_errors=True)
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"outcomes": dict(outcomes.most_common()), "failures": failures, "seconds": seconds}))


def too_slow(*_: Any) -> None:
    raise TooSlowError


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
