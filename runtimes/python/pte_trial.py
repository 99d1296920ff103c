"""Whether a .pte crashes: ExecuTorch checks a program's structure, but not all that its delegates and operators are told.

So a file that is new here is loaded and run in another process first. That it did not crash is kept, by the file's identity on
disk and the versions of what runs it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import edgekit
from edgekit.child import ChildError, run_child
from edgekit.errors import BundleError
from edgekit.machine import describe_machine
from edgekit.user_cache import cache_directory

from .executorch_runtime import executorch_version
from .kept_trials import keep_trial, read_trial, trial_file

__all__ = ["try_out"]

PROBE = "edgekit.runtimes.pte_probe"
PROBE_TIMEOUT_S = 300.0


def try_out(path: Path) -> None:
    """Load and run a program in another process, unless this was done before.

    Raises:
        BundleError: It crashes, hangs, or is not loaded.
    """
    folder, found = cache_directory(), path.stat()
    depends_on = {
        "edgekit": edgekit.__version__,
        "executorch": executorch_version(),
        "machine": asdict(describe_machine()),
        "file": (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns),  # a bundle that is renamed keeps these
    }
    kept = trial_file(folder / "executorch", depends_on) if folder else None
    if read_trial(kept) == {"problem": ""}:
        return
    try:
        run_child(PROBE, {"path": str(path.resolve())}, timeout_s=PROBE_TIMEOUT_S)
    except ChildError as error:
        raise BundleError(
            f"{path.name} does not run on ExecuTorch {executorch_version()}: {error.message}",
            hint=error.hint or "convert the model again with this version of EdgeKit",
        ) from error
    keep_trial(kept, {"problem": ""})
