"""Merges that are interrupted, killed, or made twice at once: whole or not at all, and a later one succeeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_many import merge_adapter_files
from peft_many.files.atomic import new_folder
from tests import new_process
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
@pytest.mark.parametrize("step", ["lay_out", "write", "card", "statistics", "config", "rename", "solve"])
def test_an_interrupted_save(good, tmp_path, monkeypatch, step, error):
    """Whatever fails, and wherever: nothing half-written, no temporary file, also not in place of an empty folder."""
    target = {
        "lay_out": "peft_many.merging.merge.lay_out",
        "write": "peft_many.merging.merge.TensorFileWriter.write",
        "card": "peft_many.tuner.config.update_card",
        "statistics": "peft_many.files.planned_tensors.lay_out",
        "config": "peft_many.tuner.config.MAnyConfig.save_pretrained",
        "rename": "peft_many.files.atomic.os.replace",
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
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert list((tmp_path / "empty").iterdir()) == []
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
real = peft_many.merging.merge.TensorFileWriter.write
def interrupted(*args):
    peft_many.merging.merge.TensorFileWriter.write = real  # one signal: another would cut the traceback off
    real(*args)
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(2)  # the thread that writes is waited for
peft_many.merging.merge.TensorFileWriter.write = interrupted
peft_many.merge_adapter_files(sys.argv[2:], sys.argv[1], progress=False)
"""


def test_control_c(good, tmp_path):
    """A real signal to a real process, in the middle of writing."""
    done = new_process.run(INTERRUPTED, tmp_path / "merged", good["a"], good["b"])
    assert "KeyboardInterrupt" in done.stderr
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_two_merges_into_one_folder_at_once(good, tmp_path):
    output = tmp_path / "merged"
    with new_folder(output), pytest.raises(BlockingIOError, match="Another process"):
        merge_adapter_files([good["a"], good["b"]], output, progress=False)
