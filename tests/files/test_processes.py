"""What several processes do together: each its share, and one folder of all; if one fails, all do."""

from __future__ import annotations

import datetime
import pickle
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import PeftWarning

from peft_many.files import processes
from peft_many.files.atomic import shared_folder
from peft_many.files.processes import ALONE, Processes, ProcessFailedError, all_processes


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_processes(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """Do `work(processes)` in threads that pass each other values as processes do: pickled. Errors are returned."""
    barrier, passed = threading.Barrier(count, timeout=20), [b""] * count

    class Threads(Processes):
        def _gather(self, value: Any) -> list[Any]:
            passed[self.index] = pickle.dumps(value)
            barrier.wait()
            found = [pickle.loads(content) for content in passed]
            barrier.wait()
            return found

    def run(index: int) -> Any:
        try:
            return work(Threads(count, index))
        except AssertionError:
            barrier.abort()
            raise
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(2, 6))
def test_every_step_is_one_processes_and_all_have_about_the_same_to_do(costs, count):
    steps = list(enumerate(costs))

    def cost_of(step: tuple[int, int]) -> float:
        return float(step[1])

    shares = in_processes(count, lambda all_: all_.share(steps, cost_of))
    assert sorted(step for mine in shares for step in mine) == steps
    loads = [sum(map(cost_of, mine)) for mine in shares]
    for mine, load in zip(shares, loads):
        # No process was given anything while another one had less to do.
        assert load - min(map(cost_of, mine), default=0) <= min(loads)


def test_a_process_that_is_alone_does_everything_itself(monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert all_processes("the call") is ALONE
    assert ALONE.share(["b", "c", "a"], len) == ["b", "c", "a"]
    value = object()
    assert ALONE.every(lambda: value)[0] is value
    assert ALONE.together(lambda: value) is value
    assert ALONE.in_one(lambda: value) is value
    mine = RuntimeError("mine")

    def fail() -> None:
        raise mine

    for doing in (ALONE.every, ALONE.together, ALONE.in_one):
        with pytest.raises(RuntimeError) as caught:
            doing(fail)
        assert caught.value is mine
    with shared_folder(tmp_path / "out", (), ALONE) as folder:
        (folder / "file").write_text("content")
    assert names(tmp_path / "out") == ["file"]
    with pytest.raises(RuntimeError), shared_folder(tmp_path / "another", (), ALONE):
        fail()
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_write_one_folder(tmp_path, count):
    out = tmp_path / "out"

    def work(all_: Processes) -> list[str]:
        with shared_folder(out, (), all_) as folder:
            mine = all_.together(lambda: all_.share("abcdefg", lambda step: 1.0))
            for step in mine:
                (folder / step).write_text(f"{all_.index}")
            assert not out.exists()
            all_.together(lambda: None)
        assert names(out) == list("abcdefg"), "nobody leaves before the folder has its name"
        return mine

    shares = in_processes(count, work)
    assert all(shares)
    for process, mine in enumerate(shares):
        assert {(out / step).read_text() for step in mine} == {f"{process}"}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("where", "failing"), [("inside", 0), ("inside", 1), ("in the first", 0), ("taken", 0), ("taken meanwhile", 0)]
)
def test_if_one_process_fails_all_do(tmp_path, where, failing):
    """Also if the folder cannot be had, at first or at the end, which only the first process finds out."""
    out = tmp_path / "out"

    def take() -> None:
        out.mkdir()
        (out / "file").write_text("theirs")

    def work(all_: Processes) -> None:
        def step() -> None:
            if all_.index == failing and where.startswith("in"):
                raise ValueError("no more")
            if all_.index == failing and where == "taken meanwhile":
                take()

        with shared_folder(out, (), all_):
            (all_.in_one if where == "in the first" else all_.together)(step)

    if where == "taken":
        take()
    own = FileExistsError if where.startswith("taken") else ValueError
    for process, error in enumerate(in_processes(3, work)):
        assert type(error) is (own if process == failing else ProcessFailedError)
        assert process == failing or f"Process {failing} failed: {own.__name__}: " in str(error)
    assert names(tmp_path) == (["out"] if where.startswith("taken") else [])


def test_a_step_fails_in_every_process_and_else_gives_each_its_own_or_all():
    assert in_processes(3, lambda all_: all_.together(lambda: all_.index)) == [0, 1, 2]
    assert in_processes(3, lambda all_: all_.every(lambda: all_.index)) == [[0, 1, 2]] * 3
    assert in_processes(3, lambda all_: all_.in_one(lambda: all_.index)) == [0, 0, 0]
    assert in_processes(3, lambda all_: all_.in_one(lambda: all_.index, 2)) == [2, 2, 2]

    def work(all_: Processes) -> None:
        def step() -> None:
            if all_.index:
                raise KeyError(all_.index)

        all_.together(step)

    first, *others = in_processes(3, work)
    assert isinstance(first, ProcessFailedError)
    assert str(first) == "Process 1 failed: KeyError: 1"
    assert [error.args for error in others] == [(1,), (2,)]


@dataclass
class Group:
    """A process group of two, as one of its processes sees it: how often each made a call, and who calls when."""

    me: int = 0
    limit: float = 0.2

    def __post_init__(self):
        self.counts: dict[str, int] = {}
        self.arriving: dict[str, int] = {}  # how often they are asked for until they have come

    @property
    def timeout(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=self.limit)

    def add(self, key: str, times: int) -> int:
        if times == 0 and key in self.arriving:
            self.arriving[key] -= 1
            if self.arriving[key] == 0:
                self.counts[key] = self.counts.get(key, 0) + 1
        self.counts[key] = self.counts.get(key, 0) + times
        return self.counts[key]


@pytest.fixture
def group(monkeypatch) -> Group:
    group = Group()
    monkeypatch.setattr(processes, "default_store", lambda: group)
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 0}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    return group


def test_everyone_waits_until_all_have_made_the_call_as_often(group):
    group.arriving = {"peft_many/measure/1": 3}
    assert all_processes("measure") == Processes(2, 0)
    group.arriving = {"peft_many/measure/1": 2}
    assert all_processes("measure") == Processes(2, 0)
    assert group.counts == {"peft_many/measure/0": 2, "peft_many/measure/1": 2}


def test_a_call_that_others_do_not_make_is_an_error_in_time_and_does_not_count(group, monkeypatch):
    monkeypatch.setattr(processes, "WARN_AFTER", 0.0)
    said = r"Process 0 called `measure` across processes, but process 1 of 2 did not .* `across_processes=False`"
    with (
        pytest.warns(PeftWarning, match="in process 0 is waiting for process 1 of 2"),
        pytest.raises(TimeoutError, match=said),
    ):
        all_processes("measure")
    group.arriving = {"peft_many/measure/1": 1}
    assert all_processes("measure") == Processes(2, 0)


def test_nobody_is_warned_who_waits_for_a_moment(group):
    group.arriving = {"peft_many/measure/1": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_processes("measure")


def test_of_several_processes_that_write_one_folder_the_others_learn_why_they_may_not(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    for several, said in (
        ("1", "Give another folder.$"),
        ("2", "only one of them .*`across_processes=True`"),
    ):
        monkeypatch.setenv("WORLD_SIZE", several)
        with pytest.raises(FileExistsError, match=said), shared_folder(tmp_path / "out", (), ALONE):
            pass
