"""kill -9 at any file operation of an export: no folder or the whole one, and the same call finishes it.

`pytest tests/faults --fuzz=1000` kills everywhere, and at that many random times.
"""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from peft_many import export_lora, export_model, export_routed_model
from peft_many.commands import app
from tests.adapters import files
from tests.exports.shelf import Shelf
from tests.faults.kills import _forked, _Watch, assert_next_succeeds, killed_after, killed_at, operations
from tests.faults.test_kills import places


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf.with_merge(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(params=["lora", "lora by command", "model", "routed"])
def export(shelf, request) -> Callable[[Path], Any]:
    merged = shelf.root / "merged"

    def by_command(output: Path) -> None:
        done = CliRunner().invoke(app, ["export", str(merged), "--format", "lora", "--output", str(output)])
        if done.exit_code != 0:
            raise OSError(done.output)

    return {
        "lora": lambda output: export_lora(merged, output),
        "lora by command": by_command,
        "model": lambda output: export_model(merged, output, base_model=shelf.base),
        "routed": lambda output: export_routed_model(merged, output, base_model=shelf.base),
    }[request.param]


def test_a_killed_export(shelf, tmp_path, export, request):
    work = tmp_path / "work"
    output = work / "deep" / "exported"

    def prepare() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()

    before = files(shelf.root)
    export(tmp_path / "undisturbed")
    new = files(tmp_path / "undisturbed")
    prepare()
    count = operations(lambda: export(output), work)
    assert count > 8
    assert files(output) == new
    whole = []
    everywhere = request.config.getoption("--fuzz") > 0
    for place, torn in places(count, everywhere)[:: 1 if everywhere else 3]:
        prepare()
        assert killed_at(place, lambda: export(output), work, torn=torn)
        whole.append(output.exists())
        assert_next_succeeds(output, lambda: export(output), new, (place, torn))
        assert [path.name for path in work.iterdir()] == ["deep"], (place, torn)
    assert False in whole
    assert files(shelf.root) == before


def test_exports_killed_at_random_times(shelf, tmp_path, export, request):
    random = Random(0)
    export(tmp_path / "undisturbed")
    new = files(tmp_path / "undisturbed")
    work = tmp_path / "work"
    for _ in range(request.config.getoption("--fuzz") or 3):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        killed_after(random.uniform(0.001, 0.1), lambda: export(work / "exported"))
        assert_next_succeeds(work / "exported", lambda: export(work / "exported"), new, "at random")


@pytest.mark.parametrize("size", [0, 100, 3_000])
def test_a_disk_that_is_full(tmp_path, export, size):
    """A limit on the size of files fails as a full disk does."""

    def attempt() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        with pytest.raises((OSError, SafetensorError), match=r"File too large|cannot be created"):
            export(tmp_path / "exported")

    status, _ = _forked(attempt, _Watch(tmp_path, -1, False))
    assert status == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path, export, monkeypatch):
    """It is found out before a model is loaded; the tests may run as root, whom no mode stops."""

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", "/some/.temporary.name")

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("peft_many.files.atomic.Path.mkdir", denied)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    with pytest.raises(OSError, match=r"exported' cannot be created: '.*': Permission denied"):
        export(tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []
