"""Folders written aside: what a killed process leaves goes, what a living one uses stays."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgekit import staging
from edgekit.errors import ConversionError
from edgekit.staging import working_directory, written_aside

# A process that works in a folder until it is killed; with "replace", after it put the old bundle aside.
WORKER = """
import sys
from pathlib import Path
from edgekit import staging
out, mode = Path(sys.argv[1]), sys.argv[2]

def wait(*_):
    print("working", flush=True)
    sys.stdin.read()

if mode == "replace":
    rename = staging._rename
    staging._rename = lambda path, to: wait() if to == out else rename(path, to)
with staging.written_aside(out, force=True) as folder:
    (folder / "data").write_bytes(b"x")
    if mode == "write":
        wait()
"""


@contextmanager
def worker(out: Path, mode: str = "write") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WORKER, str(out), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "working\n"
        try:
            yield process
        finally:
            process.kill()


def killed(out: Path, mode: str = "write") -> None:
    """Kill such a process: SIGKILL, which no handler sees."""
    with worker(out, mode):
        pass


def write_bundle(directory: Path, text: str = "{}", *, force: bool = False) -> None:
    with written_aside(directory, force=force) as folder:
        (folder / "edgekit.json").write_text(text, encoding="utf-8")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def suffixes(directory: Path) -> list[str]:
    return sorted(path.suffix for path in directory.iterdir())


def test_folder_becomes_the_bundle_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_bundle(tmp_path / "new" / "a.edgekit")
    write_bundle(tmp_path / "new" / "a.edgekit", force=True)
    assert names(tmp_path / "new") == ["a.edgekit"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("x"), KeyboardInterrupt()])
def test_any_error_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    with (
        pytest.raises(ConversionError if isinstance(error, OSError) else type(error)),
        written_aside(tmp_path / "a", force=False),
    ):
        raise error
    assert not names(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_leftovers_of_a_killed_process_go_with_the_next(tmp_path: Path) -> None:
    out = tmp_path / "a.edgekit"
    killed(out)
    killed(tmp_path / "b.edgekit")
    assert suffixes(tmp_path) == [".lock", ".lock", ".partial", ".partial"]
    write_bundle(out)
    assert "a.edgekit" in names(tmp_path)
    assert suffixes(tmp_path) == [".edgekit", ".lock", ".partial"]  # those of the other output stay


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_working_folders_of_a_killed_process_go_with_the_next_bundle(tmp_path: Path) -> None:
    killed(tmp_path / staging._WORKING)
    assert suffixes(tmp_path) == [".lock", ".partial"]
    write_bundle(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_full_disk_leaves_no_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, close = list[int](), os.close

    def watched(handle: int) -> None:
        closed.append(handle)
        close(handle)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(os, "close", watched)
    with pytest.raises(ConversionError, match="no space left"):
        write_bundle(tmp_path / "a")
    assert closed
    assert not names(tmp_path)


def test_folder_of_a_running_process_is_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "a.edgekit"
    with worker(out):
        write_bundle(out)
        assert suffixes(tmp_path) == [".edgekit", ".lock", ".partial"]
        assert (next(tmp_path.glob("*.partial")) / "data").is_file()


def test_folders_of_one_process_do_not_touch_each_other(tmp_path: Path) -> None:
    with working_directory(tmp_path) as first, working_directory(tmp_path) as second:
        assert first.is_dir()
        assert second.is_dir()
    assert not names(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_bundle_that_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "a.edgekit"
    write_bundle(out, "old")
    killed(out, "replace")
    assert suffixes(tmp_path) == [".lock", ".old", ".partial"]
    with pytest.raises(ConversionError, match="exists"):
        write_bundle(out)
    assert (out / "edgekit.json").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.edgekit"]


@pytest.mark.parametrize("content", ["someone else's", "edgekit on another-machine\n"])
def test_what_is_not_known_to_be_ours_stays(content: str, tmp_path: Path) -> None:
    for stem in (".a.12345678", ".a.1.2"):
        (tmp_path / f"{stem}.partial").mkdir()
    (tmp_path / ".a.12345678.lock").write_text(content, encoding="utf-8")
    before = names(tmp_path)
    write_bundle(tmp_path / "a")
    assert names(tmp_path) == [*before, "a"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_are_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (tmp_path / ".a.12345678.lock").write_bytes(staging._mark())
    (tmp_path / ".a.12345678.partial").symlink_to(precious)
    write_bundle(tmp_path / "a")
    assert names(precious) == ["file"]


def test_file_system_without_locks_serves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_try_lock", lambda handle: False)
    with written_aside(tmp_path / "a", force=False):
        assert suffixes(tmp_path) == [".partial"]
    assert names(tmp_path) == ["a"]


def test_lock_that_a_sweep_removed_at_once_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, removed = staging._try_lock, list[Path]()

    def raced(handle: int) -> bool:
        if not removed:
            removed.extend(tmp_path.glob("*.lock"))
            removed[0].unlink()
        return lock(handle)

    if sys.platform != "win32":  # where an open file can't be removed
        monkeypatch.setattr(staging, "_try_lock", raced)
    with working_directory(tmp_path):
        assert suffixes(tmp_path) == [".lock", ".partial"]
    assert not names(tmp_path)


def test_folder_that_cannot_be_removed_is_left_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where a program may still have one of its files mapped."""
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda folder, ignore_errors: None)
        with working_directory(tmp_path):
            pass
    assert suffixes(tmp_path) == [".lock", ".partial"]
    with working_directory(tmp_path):
        assert len(names(tmp_path)) == 2
    assert not names(tmp_path)


@pytest.mark.parametrize(("failures", "works"), [(2, True), (9, False)])
def test_rename_is_tried_again_where_others_hold_files(
    failures: int, works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = Path.rename, list[Any]()

    def held(path: Path, to: Path) -> Path:
        calls.append(to)
        if len(calls) <= failures:
            raise PermissionError(errno.EACCES, "in use")
        return rename(path, to)

    monkeypatch.setattr(staging, "_RENAME_PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(Path, "rename", held)
    if works:
        write_bundle(tmp_path / "a")
    else:
        with pytest.raises(ConversionError, match="in use"):
            write_bundle(tmp_path / "a")
    assert names(tmp_path) == (["a"] if works else [])


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConversionError, match="can't be written"):
        write_bundle(tmp_path / "a")
