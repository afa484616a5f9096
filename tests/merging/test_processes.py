"""Merging where several processes run: one merges alone, or all do together, and none waits for ever."""

from __future__ import annotations

import pytest
import torch

from peft_many import merge_adapter_files
from tests.adapters import files, make
from tests.forked import in_two_processes


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [make(folder / name, "llama", seed, r=2, task_name=name).folder for seed, name in enumerate("ab")]


@pytest.fixture
def merge(adapters, tmp_path):
    return lambda name="merged", **options: (
        merge_adapter_files(adapters, tmp_path / name, progress=False, **options).name
    )


def test_one_process_merges_alone(merge, tmp_path):
    def work(rank: int):
        done = merge() if rank == 0 else None
        torch.distributed.barrier()
        return done

    assert in_two_processes(work) == ["merged", None]
    assert files(tmp_path / "merged") == files(tmp_path / merge("alone"))


def test_all_merge_together(merge, tmp_path):
    assert in_two_processes(lambda rank: merge(across_processes=True)) == ["merged"] * 2
    assert files(tmp_path / "merged") == files(tmp_path / merge("alone"))


def test_all_that_merge_alone_in_one_place_hear_what_to_do(merge, tmp_path):
    def work(rank: int):
        if rank == 1:
            torch.distributed.barrier()
        done = merge()
        if rank == 0:
            torch.distributed.barrier()
        return done

    first, (kind, message) = in_two_processes(work)
    assert first == "merged"
    assert kind == "FileExistsError"
    assert "only one of them may make this call" in message
    assert "across_processes=True" in message


def test_a_call_across_processes_that_one_makes_ends(merge, tmp_path):
    first, second = in_two_processes(lambda rank: merge(across_processes=True) if rank == 0 else None, timeout=8.0)
    assert first[0] == "TimeoutError"
    assert second is None
    assert not list(tmp_path.iterdir())
