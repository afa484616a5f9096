"""kill -9 at any file operation: afterwards the old or the new is there, whole, and what was killed can be repeated.

`pytest tests/faults --fuzz=1000` kills everywhere, and at that many random times.
"""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from peft import PeftModel
from safetensors import SafetensorError

from peft_many import merge_adapter_files
from peft_many.files.errors import StatisticsError, UnmergeableAdapterError
from peft_many.files.statistics import AdapterStatistics
from tests.adapters import STATISTICS, WEIGHTS, base, files, make
from tests.faults.kills import _forked, _Watch, assert_next_succeeds, killed_after, killed_at, operations

FEW = 12


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("good")
    made = {name: make(root / name, "llama", seed=seed, task_name=name).folder for seed, name in enumerate("ab")}
    made["merged"] = merge_adapter_files([made["a"], made["b"]], root / "merged", progress=False)
    before = {name: files(folder) for name, folder in made.items()}
    yield made
    assert {name: files(folder) for name, folder in made.items()} == before


def places(count: int, everywhere: bool) -> list[tuple[int, bool]]:
    """Where to kill: all operations, or a few from the first to the last; each whole and torn."""
    step = 1 if everywhere else max(1, count // FEW)
    chosen = range(1, count + 1, step)
    both = [(place, torn) for place in chosen for torn in (False, True)]
    return both if everywhere else both[:: 2 if len(both) > 2 * FEW else 1]


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "no parent"])
def test_a_killed_merge(good, tmp_path, request, there):
    output = tmp_path / "work" / ("deep/merged" if there == "no parent" else "merged")

    def prepare() -> None:
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        (tmp_path / "work").mkdir()
        if there == "an empty folder":
            output.mkdir()

    def merge() -> None:
        merge_adapter_files([good["a"], good["b"]], output, progress=False)

    prepare()
    count = operations(merge, tmp_path / "work")
    assert count > 20
    new = files(good["merged"])
    for place, torn in places(count, request.config.getoption("--fuzz") > 0):
        prepare()
        assert killed_at(place, merge, tmp_path / "work", torn=torn)
        assert_next_succeeds(output, merge, new, (place, torn))
        assert len(list((tmp_path / "work").iterdir())) == 1


def outcome(folder: Path, scratch: Path) -> Any:
    """What merging makes of an adapter folder, or `None` if it says that it cannot be used."""
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        merged = files(merge_adapter_files([folder], scratch, progress=False))
    except (UnmergeableAdapterError, StatisticsError):
        return None
    return merged[WEIGHTS], merged[STATISTICS]


def test_a_killed_save_over_an_older_adapter(good, tmp_path, request):
    """PEFT writes the weights in place, so that neither may be left; but no mixture is ever taken for an adapter."""
    folder = tmp_path / "adapter"
    model = PeftModel.from_pretrained(base("llama"), good["b"], is_trainable=True)
    old, new = (outcome(good[name], tmp_path / "scratch") for name in "ab")

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good["a"], folder)

    def save() -> None:
        model.save_pretrained(folder)

    prepare()
    count = operations(save, folder)
    saved = outcome(folder, tmp_path / "scratch")
    assert saved is not None
    seen = []
    for place, torn in places(count, request.config.getoption("--fuzz") > 0):
        prepare()
        assert killed_at(place, save, folder, torn=torn)
        found = outcome(folder, tmp_path / "scratch")
        assert found in (old, new, saved, None), (place, torn)
        seen.append(found is None)
        save()
        assert outcome(folder, tmp_path / "scratch") == saved, (place, torn)
    assert True in seen
    assert False in seen


def test_a_killed_save_into_another_folder_that_then_takes_its_place(good, tmp_path):
    """What the documentation advises to whom the above is not enough."""
    model = PeftModel.from_pretrained(base("llama"), good["b"], is_trainable=True)
    count = operations(lambda: model.save_pretrained(tmp_path / "beside"), tmp_path)
    for place in range(1, count + 1, 3):
        shutil.rmtree(tmp_path / "beside", ignore_errors=True)
        shutil.copytree(good["a"], tmp_path / "adapter", dirs_exist_ok=True)
        killed_at(place, lambda: model.save_pretrained(tmp_path / "beside"), tmp_path)
        assert files(tmp_path / "adapter") == files(good["a"])


def test_killed_statistics(good, tmp_path, request):
    measured = AdapterStatistics.load(good["b"] / STATISTICS)
    folder, old = tmp_path / "adapter", files(good["a"])[STATISTICS]

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good["a"], folder)

    prepare()
    count = operations(lambda: measured.save(folder), folder)
    new = files(folder)[STATISTICS]
    assert new != old
    for place, torn in places(count, request.config.getoption("--fuzz") > 0):
        prepare()
        assert killed_at(place, lambda: measured.save(folder), folder, torn=torn)
        assert files(folder)[STATISTICS] in (old, new), (place, torn)
        measured.save(folder)
        assert files(folder)[STATISTICS] == new


def test_kills_at_random_times(good, tmp_path, request):
    random, new = Random(0), files(good["merged"])

    def merge() -> None:
        merge_adapter_files([good["a"], good["b"]], tmp_path / "merged", progress=False)

    for _ in range(request.config.getoption("--fuzz") or 10):
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        killed_after(random.uniform(0.001, 0.3), merge)
        assert_next_succeeds(tmp_path / "merged", merge, new, "at random")


@pytest.mark.parametrize("size", [0, 100, 3_000, 30_000])
def test_a_disk_that_is_full(good, tmp_path, size):
    """A limit on the size of files fails as a full disk does, at whatever write comes to it."""

    def merge() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"File too large|cannot be created"):
            merge_adapter_files([good["a"], good["b"]], tmp_path / "merged", progress=False)

    assert max(map(len, files(good["merged"]).values())) > size
    status, _ = _forked(merge, _Watch(tmp_path, -1, False))
    assert status == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [100, 1_000, 10_000])
def test_a_disk_that_is_full_while_statistics_are_saved(good, tmp_path, size):
    measured = AdapterStatistics.load(good["b"] / STATISTICS)
    shutil.copytree(good["a"], tmp_path / "adapter")

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        with pytest.raises((OSError, SafetensorError)):
            measured.save(tmp_path / "adapter")

    status, _ = _forked(save, _Watch(tmp_path, -1, False))
    assert status == 0
    assert files(tmp_path / "adapter") == files(good["a"])
