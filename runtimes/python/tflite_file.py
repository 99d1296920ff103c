"""A .tflite file: what can be said of it before LiteRT's C++ reads it, and its functions."""

from __future__ import annotations

import struct
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgekit.errors import BundleError, first_line
from edgekit.quiet import quieted

from .program_header import DAMAGED, read_header

__all__ = ["check_tflite", "litert_version", "load_functions"]

# A FlatBuffer: where its root table is, the schema's identifier; a table begins with how far before it its layout is.
_HEADER = struct.Struct("<I4s")
_IDENTIFIER, _FAMILY = b"TFL3", b"TFL"


def litert_version() -> str:
    """Of the package that runs programs."""
    return version("ai-edge-litert")


def check_tflite(path: Path) -> None:
    """Check that a file begins as a program does; the rest LiteRT reads, see `program_trial`.

    Raises:
        BundleError: It can't be read, is no LiteRT program, is one of another version, or is cut off.
    """
    (root, identifier), size = read_header(path, _HEADER, "a LiteRT program")
    if identifier[:3] == _FAMILY and identifier != _IDENTIFIER:
        raise BundleError(
            f"{path.name} is a LiteRT program of version {identifier.decode(errors='replace')}, "
            f"this EdgeKit reads {_IDENTIFIER.decode()}",
            hint="pip install --upgrade 'edgekit-toolkit[litert]'",
        )
    if identifier != _IDENTIFIER:
        raise BundleError(f"{path.name} is not a LiteRT program", hint=DAMAGED)
    if not _HEADER.size <= root <= size - 4:
        raise BundleError(f"{path.name} is cut off or damaged: it has {size:,} bytes", hint=DAMAGED)


def load_functions(path: Path, *, threads: int) -> tuple[Any, dict[str, Any]]:
    """The interpreter, which must outlive them, and the program's functions by name.

    Args:
        threads: How many compute; 0 leaves it to LiteRT.

    Raises:
        BundleError: LiteRT does not load it.
    """
    try:
        with quieted():
            from ai_edge_litert.interpreter import Interpreter

            interpreter = Interpreter(str(path), num_threads=threads or None)
            interpreter.allocate_tensors()  # its delegate announces itself here rather than in a forward
            return interpreter, {
                name: interpreter.get_signature_runner(name) for name in interpreter.get_signature_list()
            }
    except (ValueError, RuntimeError, TypeError) as error:  # what its bindings raise
        raise BundleError(f"{path.name} is not loaded by LiteRT: {first_line(error)}", hint=DAMAGED) from error
