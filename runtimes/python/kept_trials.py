"""What trials in other processes found out, kept for this user until something that they depend on changes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["keep_trial", "read_trial", "trial_file"]


def trial_file(folder: Path, depends_on: Mapping[str, Any]) -> Path:
    """The file of a trial, named by everything that its outcome depends on; JSON."""
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest}.json"


def read_trial(path: Path | None) -> dict[str, Any] | None:
    """What was found; None where nothing is known, or the file is damaged."""
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def keep_trial(path: Path | None, values: Mapping[str, Any]) -> None:
    """Written aside and renamed; where nothing can be written, each start tries anew."""
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(dict(values), file)
        Path(name).replace(path)
