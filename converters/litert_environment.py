"""litert-torch in an environment of its own, made when it is first needed.

It pins a release of xdsl that pins typing-extensions under 4.13, which the Core ML, Core AI and OpenAI packages do not take.
So it and what it pins are installed into a virtual environment that sees this one's packages too, PyTorch among them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from edgekit.errors import ConversionError
from edgekit.progress import Progress, ProgressFn
from edgekit.staging import working_directory
from edgekit.user_cache import cache_directory

__all__ = ["environment_python"]

LITERT_TORCH = "0.10.0"
_DONE = (
    "edgekit-done"  # written last: it says whose packages the environment sees, and its time is when it was last used
)
_UNUSED_S = 60 * 86400.0
_IN_USE_S = 86400.0  # no conversion takes as long
_PYTHON = "Scripts/python.exe" if os.name == "nt" else "bin/python"


def environment_python(on_progress: ProgressFn | None = None) -> Path:
    """The interpreter of the environment; made by pip if it is not there yet: a minute, and 800 MB.

    Raises:
        ConversionError: There is no place for it, or pip fails, as without a network.
    """
    torch = version("torch").partition("+")[0]
    kept = cache_directory()
    if kept is None:
        raise ConversionError("there is no home directory to keep LiteRT's converter in", hint="set HOME")
    seen = hashlib.sha256(_packages().encode()).hexdigest()[:8]  # two parents don't build one folder in turn
    name = f"litert-torch-{LITERT_TORCH}-torch-{torch}-{sys.implementation.cache_tag}-{seen}"
    found = kept / "environments" / name
    if not _is_made(found):
        if on_progress:
            on_progress(Progress("install", 0, 1, "environments"))
        _make(found, torch)
        if on_progress:
            on_progress(Progress("install", 1, 1, "environments"))
    with suppress(OSError):  # it may be another user's
        os.utime(found / _DONE)
    return found / _PYTHON


def _is_made(directory: Path) -> bool:
    """Whether it is complete, and sees this environment's packages."""
    with suppress(OSError):
        return (directory / _DONE).read_text(encoding="utf-8") == _packages()
    return False


def _is_left(directory: Path) -> bool:
    """Whether nobody will use it again: its parent is gone or has another version by now, or it was not used for long."""
    try:
        parent, unused_s = (
            (directory / _DONE).read_text(encoding="utf-8"),
            time.time() - (directory / _DONE).stat().st_mtime,
        )
    except OSError:  # not complete
        parent, unused_s = "", time.time() - directory.stat().st_mtime
    superseded = parent in {"", _packages()} or not any(map(os.path.isdir, parent.splitlines()))
    return unused_s > (_IN_USE_S if superseded else _UNUSED_S)


def _packages() -> str:
    """Where this environment's packages are, one folder a line."""
    folders = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    return "".join(f"{path}\n" for path in folders)


def _make(directory: Path, torch: str) -> None:
    """Made aside and renamed: another process may be making it too. What a killed one left there is swept, and what is old."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        for other in directory.parent.glob("litert-torch-*"):
            if other != directory and _is_left(other):
                shutil.rmtree(other, ignore_errors=True)
        with working_directory(directory.parent) as aside:
            _install(aside, torch)
            (aside / _DONE).write_text(_packages(), encoding="utf-8", newline="\n")
            if not _is_made(directory):
                shutil.rmtree(directory, ignore_errors=True)
                with suppress(OSError):  # the other one was first
                    aside.rename(directory)
    except OSError as error:
        raise ConversionError(f"no environment can be made for LiteRT's converter: {error}") from error


def _install(directory: Path, torch: str) -> None:
    try:
        venv.create(directory, with_pip=True)
        base = {"base": str(directory), "platbase": str(directory)}
        inside = Path(sysconfig.get_path("purelib", scheme="venv", vars=base))
        (inside / "edgekit.pth").write_text(_packages(), encoding="utf-8", newline="\n")
        wanted = [f"litert-torch=={LITERT_TORCH}", f"torch=={torch}"]
        pip = [str(directory / _PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConversionError(f"no environment can be made for LiteRT's converter: {error}") from error
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise ConversionError(
            f"litert-torch {LITERT_TORCH} can't be installed: {reasons[-1][:200]}",
            hint="conversion to LiteRT downloads its tools once; the other formats do without them",
        )
