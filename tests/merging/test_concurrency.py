"""Several at once: merges into one folder, readers during a writer, and batches of mixed tasks."""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_many import add_task, merge_adapter_files, merge_adapter_sequence, remove_task
from peft_many.files.errors import StatisticsError, UnmergeableAdapterError
from peft_many.files.statistics import AdapterStatistics
from peft_many.hub.sources import AdapterNotFoundError
from tests import tiny
from tests.adapters import STATISTICS, WEIGHTS, base, files, make


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    return {name: make(root / name, seed=seed, task_name=name).folder for seed, name in enumerate("abc")}


def started(action: Callable[[], Any]) -> int:
    """Do something in a process of its own, whose exit status is 0 if it went well and 3 after an `OSError`."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except OSError as error:
            print(error)
            os._exit(3 if "\n" not in str(error) and "merged" in str(error) else 4)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("other", ["ab", "bc"])
def test_two_merges_into_one_folder(good, tmp_path, other):
    """One is done; the other, be it the same or not, is refused, and disturbs nothing."""
    expected = {
        names: files(merge_adapter_files([good[name] for name in names], tmp_path / names, progress=False))
        for names in {"ab", other}
    }
    output = tmp_path / "merged"
    for _ in range(6):
        shutil.rmtree(output, ignore_errors=True)
        pids = {
            i: started(lambda names=names: merge_adapter_files([good[n] for n in names], output, progress=False))
            for i, names in enumerate(("ab", other))
        }
        ended = sorted(status(pid) for pid in pids.values())
        assert ended == [0, 3]
        assert files(output) in expected.values()
        assert {path.name for path in tmp_path.iterdir()} == {*expected, "merged"}


def test_a_reader_during_a_writer(good, tmp_path):
    """Statistics that are replaced while they are read: one or the other, never something of both."""
    both = [AdapterStatistics.load(good[name] / STATISTICS) for name in "ab"]
    both[0].save(tmp_path)

    def write() -> None:
        for i in range(300):
            both[i % 2].save(tmp_path)

    key = next(iter(both[0].tasks[0].input_of))
    traces = {task.name: task.covariance_of(key).trace for task in (one.tasks[0] for one in both)}
    pid, seen = started(write), set()
    until = time.monotonic() + 30
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        assert time.monotonic() < until
        (task,) = AdapterStatistics.load(tmp_path / STATISTICS).tasks
        assert task.covariance_of(key).trace == traces[task.name]
        seen.add(task.name)
    assert seen == {"a", "b"}


def test_a_reader_while_a_merge_is_replaced_in_place(good, tmp_path):
    """Tasks come and go in the folder that is read: what is made of it is one merge or the other, or an error."""
    folder = merge_adapter_files([good[name] for name in "ab"], tmp_path / "merge", progress=False)
    states = {}
    for names in ("ab", "abc"):
        whole = merge_adapter_files([good[name] for name in names], tmp_path / names, progress=False)
        states[names] = copied(whole, tmp_path / "out")

    def write() -> None:
        for _ in range(8):
            add_task(folder, good["c"], progress=False)
            remove_task(folder, "c", progress=False)

    pid, seen, refused = started(write), set(), 0
    until = time.monotonic() + 120
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        assert time.monotonic() < until
        try:
            found = copied(folder, tmp_path / "out")
        except (UnmergeableAdapterError, StatisticsError, AdapterNotFoundError):
            refused += 1
            continue
        seen.update(names for names, expected in states.items() if found == expected)
        assert found in states.values()
    assert seen == {"ab", "abc"}


def copied(merge: Path, output: Path) -> dict[str, bytes]:
    """The tensors of a merge of a merge alone, which are its own."""
    shutil.rmtree(output, ignore_errors=True)
    found = files(merge_adapter_files([merge], output, progress=False))
    return {name: found[name] for name in (WEIGHTS, STATISTICS)}


@pytest.mark.parametrize("gate_lora", [False, True])
def test_mixed_tasks_in_inference_mode(good, gate_lora):
    adapters = [good[name] for name in "abc"]
    model = merge_adapter_sequence(base("llava"), adapters, gate_lora=gate_lora, temperature=1e-3, progress=False)
    images = [[tiny.random_image("llava", row, style=row % 3)] for row in range(6)]
    prompts = [[5, 6 + row, 7] for row in range(6)]
    batch = tiny.batch(model, "llava", images, prompts)
    with torch.no_grad():
        expected = model(**batch).logits
        alone = [model(**tiny.batch(model, "llava", [i], [p])).logits for i, p in zip(images, prompts, strict=True)]
    with torch.inference_mode():
        together = model(**batch).logits
        generated = model.generate(**batch, max_new_tokens=3)
    assert torch.equal(together, expected)
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(generated, model.generate(**batch, max_new_tokens=3))
    model.train()
    model(**batch, labels=batch["input_ids"]).loss  # no inference tensor was kept  # noqa: B018
