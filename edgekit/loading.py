"""load(): a bundle, ready to generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.bundle import open_bundle
from edgekit.registry import LOADER, load_attribute

if TYPE_CHECKING:
    from edgekit.runtimes.engine import LoadedModel

__all__ = ["load"]


def load(
    path: str | Path, *, format: str | None = None, threads: int | None = None, check_hashes: bool = True
) -> LoadedModel:
    """Open a bundle and load one of its programs.

    Args:
        path: The bundle's directory.
        format: Of the program; None takes the first.
        threads: For each operator; None leaves it to the runtime.
        check_hashes: False skips the SHA-256 of the files (sizes are still compared), for the quickest start.

    Raises:
        BundleError: The bundle is missing, changed or too new, or the runtime does not load it.
    """
    bundle = open_bundle(path, check_hashes=check_hashes)
    model: LoadedModel = load_attribute(LOADER)(bundle, bundle.program(format), threads=threads)
    return model
