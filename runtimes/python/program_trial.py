"""Whether a program crashes: runtimes check a file's structure, but not all that its operators and delegates are told.

So a file that is new here is loaded and run in another process first. That it did not crash is kept, by the file's identity on
disk and the versions of what runs it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import edgekit
from edgekit.child import ChildError, run_child
from edgekit.errors import BundleError
from edgekit.machine import describe_machine
from edgekit.user_cache import cache_directory

from .kept_trials import keep_trial, read_trial, trial_file

__all__ = ["Trial", "try_out"]

PROBE_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Trial:
    """How programs of a format are tried.

    Attributes:
        runtime: What runs them, as users know it.
        version: Its own.
        probe: The module that does it, with `path`.
    """

    runtime: str
    version: str
    probe: str


def try_out(path: Path, trial: Trial) -> None:
    """Load and run a program in another process, unless this was done before.

    Raises:
        BundleError: It crashes, hangs, or is not loaded.
    """
    folder, found = cache_directory(), path.stat()
    depends_on = {
        "edgekit": edgekit.__version__,
        trial.runtime.lower(): trial.version,
        "machine": asdict(describe_machine()),
        "file": (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns),  # a bundle that is renamed keeps these
    }
    kept = trial_file(folder / trial.runtime.lower(), depends_on) if folder else None
    if read_trial(kept) == {"problem": ""}:
        return
    try:
        run_child(trial.probe, {"path": str(path.resolve())}, timeout_s=PROBE_TIMEOUT_S)
    except ChildError as error:
        raise BundleError(
            f"{path.name} does not run on {trial.runtime} {trial.version}: {error.message}",
            hint=error.hint or "convert the model again with this version of EdgeKit",
        ) from error
    keep_trial(kept, {"problem": ""})
