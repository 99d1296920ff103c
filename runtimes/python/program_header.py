"""The first bytes of a program's file, before a runtime's C++ reads it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from edgekit.errors import BundleError

__all__ = ["DAMAGED", "read_header"]

DAMAGED = "convert the model again, or copy the bundle again"


def read_header(path: Path, layout: struct.Struct, program: str) -> tuple[tuple[Any, ...], int]:
    """The fields that a file begins with, and its size in bytes.

    Args:
        path: The file.
        layout: Of the fields.
        program: What the file should be, with an article, as an error says it.

    Raises:
        BundleError: It can't be read, or is shorter than that.
    """
    try:
        with path.open("rb") as file:
            start = file.read(layout.size)
        size = path.stat().st_size
    except OSError as error:
        raise BundleError(f"{path.name} can't be read: {error.strerror or error}", hint=DAMAGED) from error
    if len(start) < layout.size:
        raise BundleError(f"{path.name} is not {program}: it has {size} bytes", hint=DAMAGED)
    return layout.unpack(start), size
