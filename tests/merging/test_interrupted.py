"""Merges that are interrupted, killed, or made twice at once: whole or not at all, and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import peft_many.merging.merge
from peft_many import merge_adapter_files
from peft_many.files.partial import partial_folder
from peft_many.merging.prepare import prepare_merge
from peft_many.records import MergeOptions
from tests.adapters import files, make


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    """Two adapters, which must stay as they are."""
    root = tmp_path_factory.mktemp("good")
    made = {name: make(root / name, seed=seed, task_name=name).folder for seed, name in enumerate("ab")}
    before = {name: files(folder) for name, folder in made.items()}
    yield made
    assert {name: files(folder) for name, folder in made.items()} == before
    assert sorted(path.name for path in root.iterdir()) == sorted(made)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("x")])
@pytest.mark.parametrize("step", ["lay_out", "write", "record", "card", "statistics", "config", "rename", "solve"])
def test_an_interrupted_save(good, tmp_path, monkeypatch, step, error):
    """Whatever fails, and wherever: nothing half-written, no temporary file, also not in place of an empty folder.

    An interruption may leave a hidden folder, from which the same call goes on.
    """
    target = {
        "lay_out": "peft_many.merging.merge.lay_out",
        "write": "peft_many.merging.merge.TensorFileWriter.write",
        "record": "peft_many.files.partial.PartialFolder.record",
        "card": "peft_many.tuner.config.update_card",
        "statistics": "peft_many.files.statistics.lay_out",
        "config": "peft_many.tuner.config.MAnyConfig.save_pretrained",
        "rename": "peft_many.files.partial.os.replace",
        "solve": "peft_many.algebra.lpm.LeastSquaresMerge.solve",
    }[step]

    def fail(*args: Any, **kwargs: Any) -> None:
        for argument in args:
            if isinstance(argument, Path) and argument.suffix in (".safetensors", ".partial"):
                half = argument / "half" if argument.is_dir() else argument
                half.write_bytes(b"half")
        raise error

    monkeypatch.setattr(target, fail)
    (tmp_path / "empty").mkdir()
    outputs = (tmp_path / "new", tmp_path / "empty", tmp_path / "deep" / "er")
    for output in outputs:
        with pytest.raises(type(error)):
            merge_adapter_files([good["a"], good["b"]], output, progress=False)
    left = [path.name for path in tmp_path.iterdir()]
    hidden = [name for name in left if name.startswith(".")]
    assert set(left) - set(hidden) in ({"empty"}, {"empty", "deep"})
    if not isinstance(error, KeyboardInterrupt) or step in ("lay_out", "write", "record", "solve"):
        assert hidden == []
    monkeypatch.undo()
    for output in outputs:
        merge_adapter_files([good["a"], good["b"]], output, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "new"]
    assert files(tmp_path / "new") == files(tmp_path / "empty") == files(tmp_path / "deep" / "er")
    merge_adapter_files([good["a"], good["b"]], tmp_path / "undisturbed", progress=False)
    assert files(tmp_path / "new") == files(tmp_path / "undisturbed")


INTERRUPTED = """
import os, signal, sys, threading
import peft_many, peft_many.merging.merge
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
real = peft_many.merging.merge.TensorFileWriter.flush
def interrupted(*args):
    real(*args)
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(20)
peft_many.merging.merge.TensorFileWriter.flush = interrupted
peft_many.merge_adapter_files(sys.argv[2:], sys.argv[1], progress=False)
"""


def test_control_c(good, tmp_path):
    """A real signal to a real process, in the middle of writing, before anything is done."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "merged"), str(good["a"]), str(good["b"])],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "KeyboardInterrupt" in done.stderr
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
import peft_many, peft_many.merging.merge
from peft_many.files.partial import PartialFolder
real, steps = PartialFolder.record, []
def killed(*args):
    real(*args)
    steps.append(args)
    if len(steps) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
PartialFolder.record = killed
peft_many.merge_adapter_files(sys.argv[3:], sys.argv[2], progress=False)
"""


def kill_after(steps: int, output: Path, adapters: list[Path]) -> None:
    command = [sys.executable, "-c", KILLED, str(steps), str(output), *map(str, adapters)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL


def solved(monkeypatch) -> list[int]:
    """Counts the groups that are merged from now on."""
    calls: list[int] = []
    real = peft_many.algebra.lpm.LeastSquaresMerge.solve

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr("peft_many.algebra.lpm.LeastSquaresMerge.solve", count)
    return calls


def test_a_killed_merge_goes_on_where_it_stopped(good, tmp_path, monkeypatch):
    adapters = [good["a"], good["b"]]
    merge_adapter_files(adapters, tmp_path / "undisturbed", progress=False)
    kill_after(3, tmp_path / "merged", adapters)
    assert not (tmp_path / "merged").exists()
    calls = solved(monkeypatch)
    merge_adapter_files(adapters, tmp_path / "again", progress=False)
    whole = len(calls)
    merge_adapter_files(adapters, tmp_path / "merged", progress=False)
    assert len(calls) - whole == whole - 3
    assert files(tmp_path / "merged") == files(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "merged", "undisturbed"]


def test_what_a_killed_merge_wrote_is_not_trusted_unread(good, tmp_path):
    """After a crash of the machine the journal may be on disk and the weights not."""
    adapters = [good["a"], good["b"]]
    merge_adapter_files(adapters, tmp_path / "undisturbed", progress=False)
    kill_after(3, tmp_path / "merged", adapters)
    (partial,) = tmp_path.glob(".merged.*.partial")
    with open(partial / "adapter_model.safetensors", "r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        length = file.seek(0, os.SEEK_END)
        file.seek(start)
        file.write(bytes(length - start))
    with open(partial / ".journal-0", "a") as journal:
        journal.write('["half a li')
    merge_adapter_files(adapters, tmp_path / "merged", progress=False)
    assert files(tmp_path / "merged") == files(tmp_path / "undisturbed")


def test_what_a_killed_merge_left_is_of_no_use_to_another(good, tmp_path, monkeypatch):
    kill_after(3, tmp_path / "merged", [good["a"], good["b"]])
    calls = solved(monkeypatch)
    merge_adapter_files([good["a"], good["b"]], tmp_path / "merged", ridge=1e-3, progress=False)
    whole = len(calls)
    merge_adapter_files([good["a"], good["b"]], tmp_path / "other", ridge=1e-3, progress=False)
    assert len(calls) == 2 * whole
    assert files(tmp_path / "merged") == files(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "other"]


def test_two_equal_merges_into_one_folder_at_once(good, tmp_path):
    output = tmp_path / "merged"
    key = prepare_merge([good["a"], good["b"]], MergeOptions(), hub={}, progress=False).key()
    with partial_folder(output, key), pytest.raises(BlockingIOError, match="Another process"):
        merge_adapter_files([good["a"], good["b"]], output, progress=False)
