"""One of two processes dies, or stops: the other ends with an error in bounded time, and leaves nothing half done."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from peft_many import merge_adapter_files
from tests import new_process
from tests.adapters import files, make


@pytest.mark.slow
@pytest.mark.parametrize("what", ["collect", "merge", "stall"])
def test_a_process_that_dies_ends_the_other(tmp_path, what):
    if what == "merge":
        for seed, name in enumerate("ab"):
            make(tmp_path / name, "llama", seed=seed, task_name=name)
    first, second = new_process.both_ranks(Path(__file__).parents[1] / "two_processes_dying.py", what, tmp_path)
    start = time.monotonic()
    first.wait(200)
    died, left = second.end(), first.end()
    assert "dying" in died.stdout
    assert left.returncode > 0, left.stderr[-3000:]  # else it was killed by us
    assert "done" not in left.stdout
    assert "Error" in left.stderr
    assert time.monotonic() - start < 180
    if what == "merge":
        assert not (tmp_path / "merged").exists()
        merged = merge_adapter_files([tmp_path / "a", tmp_path / "b"], tmp_path / "merged", progress=False)
        other = merge_adapter_files([tmp_path / "a", tmp_path / "b"], tmp_path / "other", progress=False)
        assert files(merged) == files(other)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "merged", "other"]
