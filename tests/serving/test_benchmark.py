"""The benchmark of serving runs to its end: three engines, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make serve-test")

ROOT = Path(__file__).parents[2]


def test_it_runs(tmp_path):
    command = [sys.executable, "benchmarks/serving.py", "--quick", "--threads", "1", "--output", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads((tmp_path / "serving.json").read_text())
    (turn,) = found["turns"]
    assert turn.keys() == {"plain", "routed", "gated"}
    for kind in ("routed", "gated"):
        assert found["throughput_ratio"][kind]["cpu"]["median"] == turn["plain"]["cpu"] / turn[kind]["cpu"]
