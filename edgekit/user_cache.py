"""Where EdgeKit keeps what it can find out or make again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path | None:
    """Where this user's programs may keep what they can find out again; it may not be there yet. None for users of no home."""
    try:
        home = Path.home()
    except RuntimeError:  # containers run as users that the system does not know
        return None
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "edgekit" / "cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "edgekit"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "edgekit"
