"""What is alike wherever a vendor's tools lower a program: they are kept quiet, and what they raise is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgekit.errors import ConversionError, EdgeKitError, first_line
from edgekit.progress import Progress, ProgressFn
from edgekit.quiet import quieted

__all__ = ["lowering"]


@contextmanager
def lowering(vendor: str, on_progress: ProgressFn | None) -> Iterator[None]:
    """Let a vendor's tools work; progress is told at the beginning and at the end.

    Args:
        vendor: Whose tools they are, as an error says it.
        on_progress: See `edgekit.convert`.

    Raises:
        ConversionError: They fail.
    """
    if on_progress:
        on_progress(Progress("lower", 0, 1, "programs"))
    try:
        with quieted():
            yield
    except EdgeKitError:
        raise
    except Exception as error:  # PyTorch's and the vendors' errors share no base class but this
        raise ConversionError(
            f"{vendor}'s tools failed: {first_line(error)}",
            hint="-v shows what they say; --format onnx does without them",
        ) from error
    if on_progress:
        on_progress(Progress("lower", 1, 1, "programs"))
