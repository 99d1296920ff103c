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
    path: str | Path,
    *,
    format: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    check_hashes: bool = True,
    session_cache_bytes: int | None = None,
) -> LoadedModel:
    """Open a bundle and load one of its programs.

    Args:
        path: The bundle's directory.
        format: Of the program; None takes the first.
        provider: The execution provider that must run it: `cpu`, `qnn` or `openvino`. None takes what the plan prefers where
            that works here, and else the CPU; `LoadedModel.provider` says what was chosen, and why.
        threads: For each operator; None takes the target's big cores, and no more than there are here.
        check_hashes: False skips the SHA-256 of the files (sizes are still compared), for the quickest start.
        session_cache_bytes: Memory for key-value caches. The caches of closed sessions are kept while all caches together,
            those of open sessions among them, take no more; a prompt that begins like an earlier one is computed only from
            where they part (`Stats.cached_tokens`). None is what one sequence of the whole context takes, as the plan has
            it; 0 keeps and shares nothing, so that no reply depends on what was asked before it by even a rounding error.

    Raises:
        BundleError: The bundle is missing, changed or too new, or the runtime does not load it.
        UnsupportedError: The program's format does not run on the provider.
        MissingExtraError: The provider's package is not installed.
        GenerationError: `session_cache_bytes` is negative.
    """
    bundle = open_bundle(path, check_hashes=check_hashes)
    model: LoadedModel = load_attribute(LOADER)(
        bundle,
        bundle.program(format),
        provider=provider,
        threads=threads,
        session_cache_bytes=session_cache_bytes,
    )
    return model
