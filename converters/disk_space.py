"""What a converter asks and says of the disk that it writes to."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekit.errors import ConversionError

__all__ = ["check_space", "writing"]


def check_space(directory: Path, size_bytes: int) -> None:
    """Refuse to begin what the disk can't hold.

    Args:
        directory: Where it shall be; it need not exist yet, its parent must.
        size_bytes: Of the weights.

    Raises:
        ConversionError: There is not enough space.
    """
    place = directory if directory.exists() else directory.parent
    free = shutil.disk_usage(place).free
    if size_bytes > free:
        raise ConversionError(
            f"no space left: the weights need {size_bytes / 1e6:,.0f} MB, {place} has {free / 1e6:,.0f} MB",
            hint="free some space, or choose another place with --out",
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says while a file is written, as one line.

    Raises:
        ConversionError: The disk is full or the file can't be written.
    """
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        raise ConversionError(f"{path.name} can't be written: {what}", hint="free some space, or use --out") from error
