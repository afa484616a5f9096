"""One of two processes dies, or stops: the other ends with an error in bounded time, and leaves nothing half done."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_many import merge_adapter_files
from tests.adapters import files, make


@pytest.mark.slow
@pytest.mark.parametrize("what", ["collect", "merge", "stall"])
def test_a_process_that_dies_ends_the_other(tmp_path, what):
    if what == "merge":
        for seed, name in enumerate("ab"):
            make(tmp_path / name, "llama", seed=seed, task_name=name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[1] / "two_processes_dying.py"
    both = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": Path.cwd()}
        environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
        command = [sys.executable, str(script), what, str(tmp_path)]
        both.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    start = time.monotonic()
    try:
        out, err = both[0].communicate(timeout=200)
    finally:
        for process in both:
            process.kill()
            process.wait()
        said = both[1].stdout.read()
        for process in both:
            for pipe in (process.stdout, process.stderr):
                pipe.close()
    assert b"dying" in said
    assert both[0].returncode not in (0, -9), err.decode()[-3000:]
    assert b"done" not in out
    assert b"Error" in err
    assert time.monotonic() - start < 180
    if what == "merge":
        assert not (tmp_path / "merged").exists()
        merged = merge_adapter_files([tmp_path / "a", tmp_path / "b"], tmp_path / "merged", progress=False)
        other = merge_adapter_files([tmp_path / "a", tmp_path / "b"], tmp_path / "other", progress=False)
        assert files(merged) == files(other)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "merged", "other"]
