"""Reading parts of a weight file by position, from several threads, on every platform."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import SourceError

__all__ = ["PositionalFile"]


class PositionalFile:
    """A file read in pieces.

    Plain reads, not a memory map: pages of a map stay in the process's resident memory, which would grow with
    the model. Opened anew for each piece (microseconds), so that threads share nothing and no handle outlives its use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size_bytes = path.stat().st_size
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error

    def read(self, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        """Bytes [offset, offset + size_bytes).

        Raises:
            SourceError: The file ends before that, or can't be read.
        """
        data = np.empty(size_bytes, np.uint8)
        view, done = data.data, 0
        try:
            with self.path.open("rb", buffering=0) as handle:
                handle.seek(offset)
                while done < size_bytes and (count := handle.readinto(view[done:])):
                    done += count
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if done < size_bytes:
            raise SourceError(
                f"{self.path} ends after {offset + done:,} bytes, {offset + size_bytes:,} are needed",
                hint="the download is incomplete; fetch the file again",
            )
        return data
