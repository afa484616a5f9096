"""A folder that is written over a long time: whole or not at all, and by one process at a time."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from peft_many.files.atomic import new_folder, replace_file
from tests import new_process


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def write(folder: Path, content: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "file").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from peft_many.files.atomic import new_folder, replace_file
with new_folder(Path(sys.argv[1])) as new:
    (new / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill(out: Path) -> None:
    """What a process does that is killed in the middle of writing."""
    done = new_process.run(KILLED, out)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_it_becomes_the_path_with_the_permissions_of_any_new_folder(tmp_path, out, mask):
    before = os.umask(mask)
    try:
        with new_folder(out) as new:
            write(new, "content")
            assert not out.exists()
        (tmp_path / "plain").mkdir()
    finally:
        os.umask(before)
    assert names(out) == ["file"]
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert names(tmp_path) == ["out", "plain"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_replaced_file_has_the_permissions_of_any_new_one(tmp_path, out, mask, monkeypatch):
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")  # other threads would create their files without one meanwhile
            with replace_file(out) as new:
                new.write_text("content")
                assert not out.exists()
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    assert out.read_text() == "content"
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert names(tmp_path) == ["out", "plain"]


def test_a_file_that_was_not_finished_is_not_replaced(tmp_path, out):
    def interrupted():
        with replace_file(out) as new:
            new.write_text("half")
            raise KeyboardInterrupt

    out.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert out.read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("there", ["nothing", "no parent", "an empty folder", "a link to an empty folder"])
def test_it_takes_the_place_of_nothing_and_of_what_is_empty(tmp_path, out, there):
    if there == "an empty folder":
        out.mkdir()
    elif there == "a link to an empty folder":
        (tmp_path / "target").mkdir()
        out.symlink_to(tmp_path / "target", target_is_directory=True)
    elif there == "no parent":
        out = tmp_path / "deep" / "er" / "out"
    with new_folder(out) as new:
        write(new, "content")
    assert names(out) == ["file"]
    assert names(out.parent) == ["out", "target"] if there.startswith("a link") else ["out"]
    assert out.is_symlink() == there.startswith("a link")


@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_there_is_not_touched(tmp_path, out, there):
    if there == "file":
        out.write_text("mine")
    else:
        write(out, "mine")
    with pytest.raises(FileExistsError, match="nothing was written"), new_folder(out):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["out"]
    assert (out if there == "file" else out / "file").read_text() == "mine"


@pytest.mark.parametrize("replaced", [[], ["other"]])
def test_what_appeared_meanwhile_is_not_overwritten(tmp_path, out, replaced):
    with pytest.raises(FileExistsError, match=r"nothing was written"), new_folder(out, replaced):
        write(out, "theirs")
    assert names(tmp_path) == ["out"]
    assert (out / "file").read_text() == "theirs"


def test_files_that_may_go_are_replaced_with_their_folder(tmp_path, out):
    write(out, "old")
    (out / "more").write_text("old")
    with new_folder(out, ["file", "more"]) as new:
        write(new, "new")
        assert (out / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]
    assert names(out) == ["file"]
    assert (out / "file").read_text() == "new"


@pytest.mark.parametrize("links", [True, False])
def test_what_lies_beside_files_that_may_go_stays(tmp_path, out, links, monkeypatch):
    def refused(*arguments, **options):
        raise PermissionError

    if not links:
        monkeypatch.setattr(os, "link", refused)
    write(out, "old")
    (out / "log").write_text("mine")
    (out / "also new").write_text("mine")
    (out / "link").symlink_to("log")
    (out / "checkpoint").mkdir()
    write(out / "checkpoint", "mine")
    with new_folder(out, ["file"]) as new:
        write(new, "new")
        (new / "also new").write_text("new")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["also new", "checkpoint", "file", "link", "log"]
    for name, content in {"file": "new", "also new": "new", "link": "mine", "log": "mine"}.items():
        assert (out / name).read_text() == content, name
    assert os.readlink(out / "link") == "log"
    assert (out / "checkpoint" / "file").read_text() == "mine"
    (out / "log").write_text("still mine")  # it is nobody else's file


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt("mine")])
@pytest.mark.parametrize("place", ["out", "deep/er/out"])
def test_an_error_and_an_interruption_leave_nothing(tmp_path, place, error):
    def run() -> None:
        with new_folder(tmp_path / place) as new:
            write(new, "content")
            raise error

    with pytest.raises(type(error), match="mine"):
        run()
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["out", "deep/er/out"])
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, place):
    out = tmp_path / place
    kill(out)
    assert not out.exists()
    assert names(out.parent) != []
    with new_folder(out) as new:
        assert names(new) == []
        write(new, "content")
    assert names(out) == ["file"]
    assert names(out.parent) == ["out"]


def test_what_was_left_for_another_path_stays(tmp_path, out):
    kill(tmp_path / "out.v2")
    (left,) = names(tmp_path)
    with new_folder(out) as new:
        write(new, "content")
    assert names(tmp_path) == sorted([left, "out"])


def test_a_folder_is_not_written_twice_at_once(tmp_path, out):
    with new_folder(out) as new:
        write(new, "content")
        with pytest.raises(BlockingIOError, match=f"Another process is writing '{out}'"), new_folder(out):
            pytest.fail("the block must not run")
    assert names(out) == ["file"]
    assert names(tmp_path) == ["out"]
