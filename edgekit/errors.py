"""Every error that EdgeKit raises on purpose.

    EdgeKitError
    ├── SourceError          a checkpoint that is missing, broken or inconsistent
    ├── UnsupportedError     a valid model or option that EdgeKit does not handle
    ├── TargetError          a device profile that is unknown or wrong
    ├── PlanError            a request that cannot be planned (does not fit, impossible context)
    ├── ConversionError      writing or verifying a bundle failed
    ├── BundleError          a bundle that is missing, changed or too new
    ├── MissingExtraError    an optional dependency is not installed
    └── GenerationError      a prompt or option that the loaded model cannot serve

Each carries one line that says what is wrong, and an optional hint that says what to do about it. Programming mistakes stay
TypeError and ValueError.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "ConversionError",
    "EdgeKitError",
    "GenerationError",
    "MissingExtraError",
    "PlanError",
    "SourceError",
    "TargetError",
    "UnsupportedError",
    "first_line",
]


class EdgeKitError(Exception):
    """Base of all errors a user can cause or mend.

    Args:
        message: One line, no full stop, naming the file, tensor or option.
        hint: One line that says what to do, or None.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SourceError(EdgeKitError):
    """A checkpoint is missing, truncated, hostile or disagrees with its own config."""


class UnsupportedError(EdgeKitError):
    """A valid model, tensor type or option that EdgeKit does not handle."""


class TargetError(EdgeKitError):
    """A device profile is unknown or malformed."""


class PlanError(EdgeKitError):
    """What was asked cannot be planned for this device."""


class ConversionError(EdgeKitError):
    """A bundle could not be written or did not pass its verification."""


class BundleError(EdgeKitError):
    """A bundle is missing, changed since it was written, or of a newer schema."""


class MissingExtraError(EdgeKitError):
    """An optional dependency is not installed; the hint is the pip line, and for which machines it is made where not for all."""

    def __init__(self, package: str, extra: str, machines: str = "") -> None:
        made_for = f" (made for {machines})" if machines else ""
        super().__init__(
            f"this needs the package {package}, which is not installed",
            hint=f'pip install "edgekit-toolkit[{extra}]"{made_for}',
        )


class GenerationError(EdgeKitError):
    """A prompt or an option that the loaded model cannot serve."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, without its stack; its class's name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
