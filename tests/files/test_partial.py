"""A folder that is written over a long time: whole or not at all, gone on with, and shared by several processes."""

from __future__ import annotations

import os
import pickle
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_many.files import partial, processes
from peft_many.files.partial import PartialFolder, partial_folder, shared_folder
from peft_many.files.processes import (
    ProcessFailedError,
    current_processes,
    fail_together,
    from_every_process,
    together,
)
from peft_many.statistics import gathering


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def interrupt(out: Path, *steps: str, key: str = "key", left: dict[str, str] | None = None) -> Path:
    """What a run leaves that was interrupted after some steps: the hidden folder, if it is still there."""
    try:
        with partial_folder(out, key, kept=["weights"]) as begun:
            for name, content in (left or {}).items():
                (begun.folder / name).write_text(content)
            for step in steps:
                begun.record(step, {"of": step})
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert not out.exists()
    return begun.folder


def write(folder: Path, content: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "file").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_it_becomes_the_path_with_the_permissions_of_any_new_folder(tmp_path, out, mask):
    before = os.umask(mask)
    try:
        with partial_folder(out, "key") as begun:
            write(begun.folder, "content")
            begun.record("step", 1)
            assert begun.recorded() == {"step": 1}
            assert begun.done == {}
            assert begun.folder.parent == tmp_path
            assert names(tmp_path) == [begun.folder.name]
        (tmp_path / "plain").mkdir()
    finally:
        os.umask(before)
    assert names(out) == ["file"]
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert names(tmp_path) == ["out", "plain"]


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a link to an empty folder"])
def test_it_takes_the_place_of_nothing_and_of_what_is_empty(tmp_path, out, there):
    if there == "an empty folder":
        out.mkdir()
    elif there == "a link to an empty folder":
        (tmp_path / "target").mkdir()
        out.symlink_to(tmp_path / "target", target_is_directory=True)
    with partial_folder(out, "key") as begun:
        write(begun.folder, "content")
    assert names(out) == ["file"]
    assert out.is_symlink() == there.startswith("a link")


@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_there_is_not_touched(tmp_path, out, there):
    if there == "file":
        out.write_text("mine")
    else:
        write(out, "mine")
    with pytest.raises(FileExistsError, match="nothing was written"), partial_folder(out, "key"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["out"]
    assert (out if there == "file" else out / "file").read_text() == "mine"


def test_what_appeared_meanwhile_is_not_overwritten(tmp_path, out):
    with pytest.raises(OSError, match="not empty"), partial_folder(out, "key"):
        write(out, "theirs")
    assert names(tmp_path) == ["out"]
    assert (out / "file").read_text() == "theirs"


def test_an_error_removes_it_whatever_was_done(tmp_path, out):
    def run() -> None:
        with partial_folder(out, "key") as begun:
            write(begun.folder, "content")
            begun.record("step", 1)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        run()
    assert names(tmp_path) == []


# ------------------------------------------------------------------------------------------------------ going on


def test_an_interruption_before_anything_was_done_leaves_nothing(tmp_path, out):
    interrupt(out, left={"weights": "half"})
    assert names(tmp_path) == []


def test_the_next_call_with_the_same_key_knows_what_was_done(tmp_path, out):
    first = interrupt(out, "one", "two", left={"weights": "some"})
    second = interrupt(out, "three")
    assert first == second
    with partial_folder(out, "key", kept=["weights"]) as again:
        assert again.folder == first
        assert again.done == {step: {"of": step} for step in ("one", "two", "three")}
        assert (again.folder / "weights").read_text() == "some"
        again.record("two", "anew")
        assert again.recorded()["two"] == "anew"
    assert names(out) == ["weights"]
    assert names(tmp_path) == ["out"]


def test_it_is_found_again_after_the_folders_above_were_made(tmp_path):
    """As a run leaves it that is killed between the two."""
    out = tmp_path / "deep" / "er" / "out"
    left = interrupt(out, "one")
    assert left.parent == tmp_path
    out.parent.mkdir(parents=True)
    with partial_folder(out, "key", kept=["weights"]) as begun:
        assert begun.done == {"one": {"of": "one"}}
    assert names(tmp_path) == ["deep"]
    assert names(out.parent) == ["out"]


def test_all_files_but_the_kept_ones_are_begun_anew(out):
    interrupt(out, "step", left={"weights": "some", "config": "half", ".weights.tmp": "half"})
    with partial_folder(out, "key", kept=["weights"]) as again:
        assert {name for name in names(again.folder) if name[0] != "."} == {"weights"}
        assert not (again.folder / ".weights.tmp").exists()


def test_an_error_after_an_interruption_removes_what_was_done_before(tmp_path, out):
    interrupt(out, "step")
    with pytest.raises(OSError, match="full"), partial_folder(out, "key"):
        raise OSError("the disk is full")
    assert names(tmp_path) == []


def test_another_key_removes_it(tmp_path, out):
    interrupt(out, "step")
    interrupt(tmp_path / "other", "step")
    with partial_folder(out, "another") as begun:
        assert begun.done == {}
        hidden = names(tmp_path)
        assert begun.folder.name in hidden
        assert sorted(name.split(".")[1] for name in hidden) == ["other", out.name]


def test_another_key_leaves_one_alone_that_is_being_written(tmp_path, out):
    def run() -> None:
        with partial_folder(out, "one") as one:
            write(one.folder, "one")
            with partial_folder(out, "two") as two:
                write(two.folder, "two")
            assert (one.folder / "file").read_text() == "one"

    with pytest.raises(OSError, match="not empty"):
        run()
    assert names(tmp_path) == ["out"]
    assert (out / "file").read_text() == "two"  # the first to finish


def test_a_path_that_begins_alike_is_another(tmp_path, out):
    folder = interrupt(tmp_path / "out.v2", "step")
    with partial_folder(out, "another"):
        assert folder.exists()


def test_the_same_folder_is_not_written_twice_at_once(out):
    with partial_folder(out, "key") as begun:
        with pytest.raises(BlockingIOError, match="Another process"), partial_folder(out, "key"):
            pytest.fail("the block must not run")
        begun.record("step", 1)
        assert begun.recorded() == {"step": 1}
    assert names(out) == []


@pytest.mark.parametrize("torn", ['["half', '["half", ', '["half", {"a": 1}', "[", "\0\0\0\0"])
def test_a_line_that_was_cut_off_is_a_step_that_was_not_done(out, torn):
    folder = interrupt(out, "one")
    with open(folder / ".journal-0", "a") as journal:
        journal.write(torn)
    with partial_folder(out, "key") as again:
        assert again.done == {"one": {"of": "one"}}


def test_a_step_that_is_done_after_a_line_was_cut_off_counts(out):
    folder = interrupt(out, "one")
    with open(folder / ".journal-0", "a") as journal:
        journal.write('["half')
    with partial_folder(out, "key") as again:
        again.record("half", 1)
        again.record("two", 2)
        assert again.recorded() == {"one": {"of": "one"}, "half": 1, "two": 2}


def test_what_is_recorded_comes_back_as_json(out):
    result = {"größe": [1, 2.5, None, True], "zeilen": "eins\nzwei\u2028drei"}
    with partial_folder(out, "key") as begun:
        begun.record("层.0", result)
        assert begun.recorded() == {"层.0": result}


# --------------------------------------------------------------------------------------------- several processes


costs = st.lists(st.integers(0, 1000), max_size=30)


@given(costs, st.integers(1, 6))
def test_every_step_is_one_processes_and_all_have_about_the_same_to_do(costs, count):
    steps = list(enumerate(costs))
    folders = [PartialFolder(Path(), {}, process, count) for process in range(count)]
    shares = [folder.share(steps, cost_of) for folder in folders]
    assert sorted(step for share in shares for step in share) == steps
    loads = [sum(map(cost_of, share)) for share in shares]
    for share, load in zip(shares, loads):
        # No process was given anything while another one had less to do.
        assert load - min(map(cost_of, share), default=0) <= min(loads)


def cost_of(step: tuple[int, int]) -> float:
    return float(step[1])


def test_alone_one_does_every_step_in_order():
    assert PartialFolder(Path(), {}).share(["b", "c", "a"], len) == ["b", "c", "a"]


def test_a_process_that_is_alone_does_everything_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert current_processes() is None
    value = object()
    assert from_every_process(value) == [value]
    assert from_every_process(value)[0] is value
    assert together(lambda: value) is value
    fail_together(None)
    PartialFolder(Path(), {}).wait()
    mine = RuntimeError("mine")

    def fail() -> None:
        raise mine

    for failing in (lambda: together(fail), lambda: fail_together(mine)):
        with pytest.raises(RuntimeError) as caught:
            failing()
        assert caught.value is mine


def test_alone_a_shared_folder_is_a_partial_one(tmp_path, out):
    interrupt(out, "step")
    with shared_folder(out, "key") as begun:
        assert (begun.process, begun.processes, begun.is_first) == (0, 1, True)
        assert begun.done == {"step": {"of": "step"}}
    assert names(tmp_path) == ["out"]


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
        for module in (gathering, partial, processes):
            patch.setattr(module, "from_every_process", from_every)
        for module in (partial, processes):
            patch.setattr(module, "current_processes", State)
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_write_one_folder(monkeypatch, tmp_path, out, count):
    interrupt(out, "an earlier run's")

    def work(process: int) -> dict[str, Any]:
        with shared_folder(out, "key") as begun:
            assert (begun.process, begun.processes, begun.is_first) == (process, count, process == 0)
            assert begun.done == {"an earlier run's": {"of": "an earlier run's"}}
            begun.wait()  # nobody may record before all have read
            for step in begun.share("abcdefg", lambda step: 1.0):
                (begun.folder / step).write_text(f"{process}")
                begun.record(step, process)
            begun.wait()
            recorded = begun.recorded()
            begun.wait()
        assert names(out) == list("abcdefg"), "nobody leaves before the folder has its name"
        return recorded

    for recorded in in_processes(monkeypatch, count, work):
        assert set(recorded) == {*"abcdefg", "an earlier run's"}
        assert {recorded[step] for step in "abcdefg"} == set(range(count))
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("where", "failing"),
    [("inside", 0), ("inside", 1), ("after a wait", 0), ("after a wait", 2), ("taken", 0)],
)
def test_if_one_process_fails_all_do(monkeypatch, tmp_path, out, where, failing):
    if where == "taken":  # which only the first process finds out
        write(out, "mine")

    def work(process: int) -> None:
        with shared_folder(out, "key") as begun:
            if where == "after a wait":
                begun.wait()
            begun.record(f"{process}", 1)
            if process == failing:
                raise ValueError("no more")
            begun.wait()

    own = FileExistsError if where == "taken" else ValueError
    for process, error in enumerate(in_processes(monkeypatch, 3, work)):
        assert type(error) is (own if process == failing else ProcessFailedError)
        assert process == failing or f"Process {failing} failed: {own.__name__}: " in str(error)
    assert names(tmp_path) == (["out"] if where == "taken" else [])


def test_together_fails_in_every_process_and_else_gives_each_its_own(monkeypatch):
    assert in_processes(monkeypatch, 3, lambda process: together(lambda: process)) == [0, 1, 2]

    def work(process: int) -> None:
        def step() -> None:
            if process:
                raise KeyError(process)

        together(step)

    first, *others = in_processes(monkeypatch, 3, work)
    assert isinstance(first, ProcessFailedError)
    assert str(first) == "Process 1 failed: KeyError: 1"
    assert [error.args for error in others] == [(1,), (2,)]
