"""Folders that are written aside: they become a bundle in one step, or vanish, even if their process was killed.

A folder `.NAME.RANDOM.partial` has a file `.NAME.RANDOM.lock` beside it, which its process keeps locked. The system frees the
lock when the process ends, however it ends; whoever works on the same NAME next finds the lock free and removes the folder.
What has no such file, or one that is locked or was made on another machine, is never touched.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgekit.bundle import MANIFEST
from edgekit.errors import ConversionError

__all__ = ["working_directory", "writable", "written_aside"]

_WORKING = "edgekit-working"  # one name for all that is of use for a while: whoever works beside it next sweeps it
_PARTIAL, _OLD, _LOCK = ".partial", ".old", ".lock"
_LOCK_ATTEMPTS = 3
# On Windows a virus scanner or an indexer may hold a fresh file for a moment, and then its folder can't be renamed.
_RENAME_PAUSES_S: tuple[float, ...] = (0.1, 0.4, 1.5) if sys.platform == "win32" else ()

if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process has it, or the file system has no locks
            return False
        return True


@contextmanager
def written_aside(directory: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `directory` on success and vanishes on any error.

    Raises:
        ConversionError: `directory` exists and `force` is not set, is no bundle, or can't be written.
    """
    with _told_as_conversion_errors(directory):
        _sweep(directory.parent, directory.name, bundle=directory)
        _sweep(directory.parent, _WORKING)
        _check_free(directory, force)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked_folder(directory.parent, directory.name) as unfinished:
            yield unfinished
            unfinished.chmod(0o755)  # mkdtemp's own is for its owner only
            _replace(unfinished, directory)


def _check_free(directory: Path, force: bool) -> None:
    if directory.exists() and not force:
        raise ConversionError(f"{directory} exists", hint="use --force to overwrite it, or --out for another place")
    if directory.exists() and not (directory / MANIFEST).is_file():
        raise ConversionError(
            f"{directory} is not a bundle and is not overwritten", hint="choose another place with --out"
        )


@contextmanager
def working_directory(parent: Path) -> Iterator[Path]:
    """A folder in `parent` for as long as it is needed; what dead processes left of such folders goes first.

    Raises:
        OSError: It can't be made.
    """
    _sweep(parent, _WORKING)
    with _locked_folder(parent, _WORKING) as folder:
        yield folder


def writable(folder: Path) -> Path:
    """The folder, or else where the system keeps temporary files. Tried, not asked: Windows' permissions do not tell."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.gettempdir())


@contextmanager
def _locked_folder(parent: Path, name: str) -> Iterator[Path]:
    lock = _locked_file(parent, name)
    try:
        folder = _folder_of(lock, parent, name)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # Windows keeps what is still mapped, or open elsewhere
    finally:
        if lock:
            os.close(lock[0])
            _forget(lock[1])


@contextmanager
def _told_as_conversion_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = "no space left on the device" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        raise ConversionError(f"{directory} can't be written: {what}", hint="free some space, or use --out") from error


def _locked_file(parent: Path, name: str) -> tuple[int, Path] | None:
    """An open lock file of our own; None where the file system has no locks, and nobody will clear up after us."""
    for _ in range(_LOCK_ATTEMPTS):
        handle, path = tempfile.mkstemp(prefix=f".{name}.", suffix=_LOCK, dir=parent)
        kept = False
        try:
            # Between these two lines a sweep may have found it free, and removed it.
            if _try_lock(handle) and os.path.exists(path):
                os.write(handle, _mark())
                kept = True
                return handle, Path(path)
        finally:
            if not kept:
                os.close(handle)
                Path(path).unlink(missing_ok=True)
    return None


def _folder_of(lock: tuple[int, Path] | None, parent: Path, name: str) -> Path:
    if lock is None:
        return Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=_PARTIAL, dir=parent))
    folder = lock[1].with_suffix(_PARTIAL)
    folder.mkdir(mode=0o700)
    return folder


def _mark() -> bytes:
    """What a lock file says. Locks of a shared folder may not be seen by other machines, so it names ours."""
    return f"edgekit on {platform.node()}\n".encode()


def _sweep(parent: Path, name: str, *, bundle: Path | None = None) -> None:
    """Remove what dead processes left, and bring a bundle back that one was about to replace."""
    mine = re.compile(rf"\.{re.escape(name)}\.\w+{re.escape(_LOCK)}")
    with suppress(OSError):  # no such folder, or not readable: making our own will tell
        for path in [path for path in parent.iterdir() if mine.fullmatch(path.name)]:
            with suppress(OSError):
                _sweep_one(path, bundle)


def _sweep_one(lock: Path, bundle: Path | None) -> None:
    handle = os.open(lock, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        if not _try_lock(handle) or os.read(handle, 1024) not in {b"", _mark()}:
            return
        old = lock.with_suffix(_OLD)
        if bundle and old.is_dir() and not bundle.exists():
            old.rename(bundle)
        for folder in (lock.with_suffix(_PARTIAL), old):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)
    _forget(lock)


def _forget(lock: Path) -> None:
    """Remove a lock file, unless it still tells of a folder that could not be removed."""
    if not any(lock.with_suffix(suffix).exists() for suffix in (_PARTIAL, _OLD)):
        with suppress(OSError):  # Windows: another sweep has just opened it
            lock.unlink(missing_ok=True)


def _replace(unfinished: Path, directory: Path) -> None:
    if not directory.exists():
        _rename(unfinished, directory)
        return
    old = unfinished.with_suffix(_OLD)  # directories can't be replaced in one step
    _rename(directory, old)
    try:
        _rename(unfinished, directory)
    except BaseException:
        _rename(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)  # Windows keeps what another process has open


def _rename(path: Path, to: Path) -> None:
    for pause_s in _RENAME_PAUSES_S:
        try:
            path.rename(to)
            return
        except PermissionError:
            time.sleep(pause_s)
    path.rename(to)
