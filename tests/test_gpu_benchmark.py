"""`make gpu` in miniature: everything that it does on a GPU it does here on the CPU, or says that it needs CUDA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import all_steps, options
from benchmarks.gpu.goals import GOALS, table_of_goals, table_of_steps
from benchmarks.gpu.meters import Meter
from benchmarks.gpu.steps import Record, Run, SkippedError, Step
from tests import new_process

ROOT = Path(__file__).parents[1]
ONE = torch.ones(3)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> dict:
    """What a run wrote."""
    folder = tmp_path_factory.mktemp("gpu")
    arguments = ["--tiny", "--device", "cpu", "--output", str(folder), "--scratch", str(folder)]
    program = f"import sys; from benchmarks.gpu.__main__ import main; sys.exit(main({arguments}))"
    done = new_process.run(program, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["gpu.json"], "nothing else is left"
    return json.loads((folder / "gpu.json").read_text())


@pytest.mark.slow
def test_every_step_is_done(miniature):
    assert list(miniature["steps"]) == [step.name for step in all_steps(False)]
    undone = {name: step["why"] for name, step in miniature["steps"].items() if step["status"] != "done"}
    assert undone == {"compiled by inductor": "needs CUDA"}
    for name in ("merging", "statistics", "outputs", "autocast", "attention", "generating", "offloaded", "FSDP2"):
        assert miniature["steps"][name]["checks"]


@pytest.mark.slow
def test_the_gate_breaks_no_graph(miniature):
    graphs = miniature["steps"]["compiled"]["numbers"]
    assert graphs["gated, graphs"] == graphs["plain, graphs"]


@pytest.mark.slow
def test_what_needs_cuda_is_said(miniature):
    parts = {part for step in miniature["steps"].values() for part in step.get("skipped", {})}
    assert parts == {"flash_attention_2", "CUDA graphs", "memory added"}
    told = {why for step in miniature["steps"].values() for why in step.get("skipped", {}).values()}
    assert all(why.startswith("needs CUDA") for why in told)


@pytest.mark.slow
def test_every_goal_has_a_number_beside_it(miniature):
    goals = {goal["what"]: goal for goal in miniature["goals"]}
    missing = {goal["what"] for goal in miniature["goals"] if goal["measured"] is None}
    assert missing == {"memory that collecting adds"}
    counted = {goal.what for goal in GOALS if goal.counted}
    assert {what for what, goal in goals.items() if goal["met"] is not None} == counted, "times say nothing here"


def run(path: Path, steps: list[Step], budget: float = 100.0, in_miniature: bool = False) -> tuple[Run, list[str]]:
    told: list[str] = []
    done = Run(path / "gpu.json", {"benchmark": "gpu"}, budget, told.append, lambda: None, in_miniature)
    done.all(steps, None)
    return done, told


def written(path: Path) -> dict:
    return json.loads((path / "gpu.json").read_text())["steps"]


def test_a_step_that_fails_is_told_and_the_others_go_on(tmp_path):
    def breaks(lab, record):
        record.number("before", 1)
        raise ZeroDivisionError("by nothing")

    def follows(lab, record):
        seen.update(written(tmp_path))
        record.check("one", ONE, ONE, 0.0)

    seen: dict = {}
    done, told = run(tmp_path, [Step("breaks", breaks, 1), Step("follows", follows, 1)])
    assert seen["breaks"]["numbers"] == {"before": 1}, "it was on disk before the next began"
    assert "ZeroDivisionError: by nothing" in seen["breaks"]["why"]
    assert 'raise ZeroDivisionError("by nothing")' in told[0]
    assert seen["follows"]["status"] == "running"
    assert written(tmp_path)["follows"]["status"] == "done"
    assert not done.went_well


@pytest.mark.parametrize(
    ("found", "most"), [(2 * ONE, 0.1), (ONE * float("nan"), 0.1), ({"a": ONE, "b": 2 * ONE}, 0.1)]
)
def test_what_is_off_is_wrong(tmp_path, found, most):
    expected = {"a": ONE, "b": ONE} if isinstance(found, dict) else ONE
    done, told = run(tmp_path, [Step("off", lambda lab, record: record.check("it", found, expected, most), 1)])
    assert written(tmp_path)["off"]["status"] == "wrong"
    assert "it is off by" in told[0]
    assert not done.went_well


def test_what_is_missing_is_an_error(tmp_path):
    run(tmp_path, [Step("missing", lambda lab, record: record.check("it", {}, {"a": ONE}, 0.1), 1)])
    assert written(tmp_path)["missing"]["status"] == "failed"


def test_an_attempt_may_fail(tmp_path):
    def impossible(lab, record):
        raise RuntimeError("gloo cannot")

    done, _ = run(tmp_path, [Step("attempt", impossible, 1, attempt=True)])
    found = written(tmp_path)["attempt"]
    assert (found["status"], found["why"]) == ("not possible", "RuntimeError: gloo cannot")
    assert done.went_well


def test_what_there_is_no_time_for_is_skipped(tmp_path):
    step = Step("long", lambda lab, record: record.number("x", 1), 60)
    done, told = run(tmp_path, [step], budget=30)
    assert written(tmp_path)["long"]["status"] == "skipped"
    assert "may take 60 s" in told[0]
    assert done.went_well
    run(tmp_path, [step], budget=30, in_miniature=True)
    assert written(tmp_path)["long"]["status"] == "done"


def test_a_step_may_skip_itself_or_a_part(tmp_path):
    def part(lab, record):
        record.skip("graphs", "needs CUDA")

    def whole(lab, record):
        raise SkippedError("needs the merge")

    _, told = run(tmp_path, [Step("part", part, 1), Step("whole", whole, 1)])
    assert told[0].endswith("graphs skipped: needs CUDA")
    assert [step["status"] for step in written(tmp_path).values()] == ["done", "skipped"]
    assert written(tmp_path)["whole"]["why"] == "needs the merge"


def test_goals_are_met_missed_or_unknown():
    goal = next(goal for goal in GOALS if goal.unit == "GiB")
    judged = [
        goal.judged({goal.step: Record(numbers={goal.number: gib * 2**30})}, in_miniature)
        for gib, in_miniature in ((3.5, False), (5, False), (3.5, True))
    ]
    judged.append(goal.judged({}, False))
    assert [one["met"] for one in judged] == [True, False, None, None]
    assert [one["measured"] for one in judged] == [3.5, 5, 3.5, None]
    assert table_of_goals(judged).row_count == 4
    record = Record(status="wrong")
    record.check("it", 2 * ONE, ONE, 0.1)
    assert table_of_steps({"a": record, "b": Record()}).row_count == 2


def test_full_size_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        options(["--device", "cpu"])
    assert "`--tiny` runs everything in miniature" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        options(["--tiny", "--only", "merging", "nothing"])
    assert "no steps ['nothing']" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_profiler_that_sees_nothing_counts_nothing():
    assert Meter(torch.device("cpu")).profiled(lambda: ONE + ONE) is None
