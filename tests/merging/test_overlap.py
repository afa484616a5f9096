"""Reading, merging and writing at once: the same as one after another, in bounded memory, and whole or not at all."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections import deque
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_many import merge_adapter_files, merge_adapter_sequence
from peft_many.files import planned_tensors
from peft_many.files.statistics import STATISTICS_NAME, AdapterStatistics
from peft_many.files.tensor_file import TensorFileWriter, lay_out
from peft_many.merging import group, merged_statistics, reading
from peft_many.merging.overlap import overlapped
from tests.adapters import base, files, make


class Piece:
    """Something that takes memory."""


def peak(ahead: int, slow: str) -> tuple[int, list[int]]:
    """The most pieces that lived at once, and what was written, with one step slower than the others."""
    alive: weakref.WeakSet[Piece] = weakref.WeakSet()
    counts, written = [], []
    pause = threading.Event()

    def step(name: str, place: int) -> tuple[int, Piece]:
        if name == slow:
            pause.wait(0.01)
        piece = Piece()
        alive.add(piece)
        counts.append(len(alive))
        return place, piece

    def write(made: tuple[int, Piece]) -> None:
        if slow == "write":
            pause.wait(0.01)
        written.append(made[0])

    gc.disable()
    try:
        for _ in overlapped(range(20), lambda i: step("read", i), lambda got: step("work", got[0]), write, ahead):
            pass
    finally:
        gc.enable()
    return max(counts), written


@pytest.mark.parametrize("slow", ["read", "work", "write"])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_memory_is_bounded_whichever_step_is_slow(ahead, slow):
    """What is worked on is there twice, as it was read and as it was made."""
    most, written = peak(ahead, slow)
    assert most <= 2 * ahead + 2
    assert written == list(range(20))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
@pytest.mark.parametrize("where", ["read", "work", "write", "caller"])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_errors_come_out_as_they_are_and_end_everything(where, error, ahead):
    begun = []
    failure = error("broken")

    def step(name):
        def run(item):
            begun.append((name, item))
            if name == where and item == 4:
                raise failure
            return item

        return run

    before = threading.active_count()
    done = overlapped(range(50), step("read"), step("work"), step("write"), ahead)
    with pytest.raises(error) as caught, contextlib.closing(done):
        deque(map(step("caller"), done))
    assert caught.value is failure
    assert threading.active_count() == before
    assert max(item for _, item in begun) <= 4 + 2 * ahead + 1


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("tasks")
    return [make(root / name, "llava", seed=seed, task_name=name).folder for seed, name in enumerate("abc")]


@pytest.mark.parametrize("options", [{}, {"gate_lora": True}, {"rank": 3}, {"method": "ties"}])
def test_with_threads_and_without_to_the_bit(tasks, tmp_path, monkeypatch, options):
    found = []
    for ahead in (0, 1, 3):
        monkeypatch.setitem(group.GROUPS_AHEAD, "cpu", ahead)
        merge_adapter_files(tasks, tmp_path / str(ahead), progress=False, **options)
        found.append(files(tmp_path / str(ahead)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("x")])
@pytest.mark.parametrize("step", ["read", "write"])
def test_an_error_in_the_middle_leaves_nothing(tasks, tmp_path, monkeypatch, step, error):
    calls = []

    def fails_at_third(real):
        def run(*given):
            calls.append(1)
            if len(calls) == 3:
                raise error
            return real(*given)

        return run

    if step == "read":
        monkeypatch.setattr(group, "read_group", fails_at_third(reading.read_group))
    else:
        monkeypatch.setattr(TensorFileWriter, "write", fails_at_third(TensorFileWriter.write))
    before = threading.active_count()
    with pytest.raises(type(error)) as caught:
        merge_adapter_files(tasks, tmp_path / "merged", progress=False)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before
    if step == "read":
        calls.clear()
        model = base("llava")
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(type(error)):
            merge_adapter_sequence(model, tasks, progress=False)
        assert [name for name, _ in model.named_modules()] == names


def test_a_device_without_float64_gives_the_merge_of_the_cpu(tasks, tmp_path, monkeypatch):
    """As Apple's "mps", for which "meta" stands in."""
    monkeypatch.setattr("peft_many.algebra.devices.WITHOUT_FLOAT64", ("meta",))
    monkeypatch.setattr("peft_many.merging.arguments.answers", lambda device, dtype: device)
    for device in ("cpu", "meta"):
        merge_adapter_files(tasks, tmp_path / device, device=device, progress=False)
    assert files(tmp_path / "cpu") == files(tmp_path / "meta")


@pytest.mark.parametrize("guessed", [True, False])
@pytest.mark.parametrize("layers", ["side by side", "otherwise"])
def test_statistics_that_were_copied_while_merging_are_those_saved_at_the_end(
    tasks, tmp_path, monkeypatch, layers, guessed
):
    """Also where the guess about the layers was wrong. A rank leaves no tasks' blocks."""
    if not guessed:
        real = merged_statistics._keeps_blocks
        monkeypatch.setattr(merged_statistics, "_keeps_blocks", lambda *of: not real(*of))
    laid_out = []
    monkeypatch.setattr(planned_tensors, "lay_out", lambda *of: laid_out.append(1) or lay_out(*of))
    merge_adapter_files(tasks, tmp_path / "merged", progress=False, rank=None if layers == "side by side" else 3)
    assert len(laid_out) == (1 if guessed else 2)
    found = AdapterStatistics.load(tmp_path / "merged" / STATISTICS_NAME)
    assert bool(found.tasks[0].lora_B) == (layers == "otherwise")
    found.save(tmp_path)
    one, two = (load_file(folder / STATISTICS_NAME) for folder in (tmp_path, tmp_path / "merged"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    again = AdapterStatistics.load(tmp_path / STATISTICS_NAME)
    assert [task.fingerprints for task in again.tasks] == [task.fingerprints for task in found.tasks]
    assert max(map(max, found.tasks[0].fingerprints.values())) > 0


def test_an_error_in_copying_statistics_leaves_nothing(tasks, tmp_path, monkeypatch):
    real = TensorFileWriter.write

    def fail(writer, key, tensor):
        if ".covariance." in key:
            raise OSError(28, "No space left on device")
        real(writer, key, tensor)

    monkeypatch.setattr(TensorFileWriter, "write", fail)
    with pytest.raises(OSError, match="No space"):
        merge_adapter_files(tasks, tmp_path / "merged", progress=False)
    assert list(tmp_path.iterdir()) == []
