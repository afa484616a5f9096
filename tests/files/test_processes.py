"""What several processes do together: each its share, and one folder of all; if one fails, all do."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_many.files import processes
from peft_many.files.processes import (
    ProcessFailedError,
    current_processes,
    from_every_process,
    in_first,
    share,
    shared_folder,
    together,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_processes(monkeypatch: pytest.MonkeyPatch, count: int, work: Callable[[int], Any]) -> list[Any]:
    """Do `work(process)` in threads that pass each other values as processes do: pickled. Errors are returned."""
    barrier, passed, me = threading.Barrier(count, timeout=20), [b""] * count, threading.local()

    class State:
        num_processes = count
        process_index = property(lambda self: me.process_index)
        is_main_process = property(lambda self: me.process_index == 0)

    def from_every(value: Any) -> list[Any]:
        passed[me.process_index] = pickle.dumps(value)
        barrier.wait()
        found = [pickle.loads(content) for content in passed]
        barrier.wait()
        return found

    def run(process: int) -> Any:
        me.process_index = process
        try:
            return work(process)
        except AssertionError:
            barrier.abort()
            raise
        except Exception as error:
            return error

    with monkeypatch.context() as patch, ThreadPoolExecutor(count) as pool:
        patch.setattr(processes, "from_every_process", from_every)
        patch.setattr(processes, "current_processes", State)
        return list(pool.map(run, range(count)))


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(2, 6))
def test_every_step_is_one_processes_and_all_have_about_the_same_to_do(costs, count):
    steps = list(enumerate(costs))

    def cost_of(step: tuple[int, int]) -> float:
        return float(step[1])

    shares = in_processes(pytest.MonkeyPatch(), count, lambda process: share(steps, cost_of))
    assert sorted(step for mine in shares for step in mine) == steps
    loads = [sum(map(cost_of, mine)) for mine in shares]
    for mine, load in zip(shares, loads):
        # No process was given anything while another one had less to do.
        assert load - min(map(cost_of, mine), default=0) <= min(loads)


def test_a_process_that_is_alone_does_everything_itself(monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert current_processes() is None
    assert share(["b", "c", "a"], len) == ["b", "c", "a"]
    value = object()
    assert from_every_process(value)[0] is value
    assert together(lambda: value) is value
    assert in_first(lambda: value) is value
    mine = RuntimeError("mine")

    def fail() -> None:
        raise mine

    for doing in (together, in_first):
        with pytest.raises(RuntimeError) as caught:
            doing(fail)
        assert caught.value is mine
    with shared_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("content")
    assert names(tmp_path / "out") == ["file"]
    with pytest.raises(RuntimeError), shared_folder(tmp_path / "another"):
        fail()
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_write_one_folder(monkeypatch, tmp_path, count):
    out = tmp_path / "out"

    def work(process: int) -> list[str]:
        with shared_folder(out) as folder:
            mine = together(lambda: share("abcdefg", lambda step: 1.0))
            for step in mine:
                (folder / step).write_text(f"{process}")
            assert not out.exists()
            together(lambda: None)
        assert names(out) == list("abcdefg"), "nobody leaves before the folder has its name"
        return mine

    shares = in_processes(monkeypatch, count, work)
    assert all(shares)
    for process, mine in enumerate(shares):
        assert {(out / step).read_text() for step in mine} == {f"{process}"}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("where", "failing"), [("inside", 0), ("inside", 1), ("in the first", 0), ("taken", 0), ("taken meanwhile", 0)]
)
def test_if_one_process_fails_all_do(monkeypatch, tmp_path, where, failing):
    """Also if the folder cannot be had, at first or at the end, which only the first process finds out."""
    out = tmp_path / "out"

    def take() -> None:
        out.mkdir()
        (out / "file").write_text("theirs")

    def work(process: int) -> None:
        def step() -> None:
            if process == failing and where.startswith("in"):
                raise ValueError("no more")
            if process == failing and where == "taken meanwhile":
                take()

        with shared_folder(out):
            (in_first if where == "in the first" else together)(step)

    if where == "taken":
        take()
    own = FileExistsError if where.startswith("taken") else ValueError
    for process, error in enumerate(in_processes(monkeypatch, 3, work)):
        assert type(error) is (own if process == failing else ProcessFailedError)
        assert process == failing or f"Process {failing} failed: {own.__name__}: " in str(error)
    assert names(tmp_path) == (["out"] if where.startswith("taken") else [])


def test_together_fails_in_every_process_and_else_gives_each_its_own(monkeypatch):
    assert in_processes(monkeypatch, 3, lambda process: together(lambda: process)) == [0, 1, 2]
    assert in_processes(monkeypatch, 3, lambda process: in_first(lambda: process)) == [0, 0, 0]

    def work(process: int) -> None:
        def step() -> None:
            if process:
                raise KeyError(process)

        together(step)

    first, *others = in_processes(monkeypatch, 3, work)
    assert isinstance(first, ProcessFailedError)
    assert str(first) == "Process 1 failed: KeyError: 1"
    assert [error.args for error in others] == [(1,), (2,)]
