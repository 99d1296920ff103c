"""What can be said of a .pte file before ExecuTorch's C++ reads it: is it one, of a version that is known, and whole.

The layout (ExecuTorch's `exir/_serialize/_program.py`): a FlatBuffer with the identifier "ET12" at byte 4, then the extended
header "eh00" with its length, the FlatBuffer's size, and where the segments of weights and delegates begin and how long they
are. ExecuTorch checks the FlatBuffer's own structure when it loads it.
"""

from __future__ import annotations

import struct
from pathlib import Path

from edgekit.errors import BundleError

from .program_header import DAMAGED, read_header

__all__ = ["check_pte"]

_IDENTIFIER, _FAMILY = b"ET12", b"ET"
_EXTENDED = b"eh00"
_HEADER = struct.Struct("<4x4s4sIQQQ")  # root offset, identifiers, the extended header's length, its three sizes
# From the extended identifier on: of the first version that says how long the segments are.
_LEAST_LENGTH = _HEADER.size - 8


def check_pte(path: Path) -> None:
    """Check a program's header against its file.

    Raises:
        BundleError: It can't be read, is no ExecuTorch program, is one of another version, or is cut off.
    """
    (identifier, extended, length, program_size, segments_start, segments_size), size = read_header(
        path, _HEADER, "an ExecuTorch program"
    )
    if identifier[:2] == _FAMILY and identifier[2:].isdigit() and identifier != _IDENTIFIER:
        raise BundleError(
            f"{path.name} is an ExecuTorch program of version {identifier.decode()}, this EdgeKit reads {_IDENTIFIER.decode()}",
            hint="pip install --upgrade 'edgekit-toolkit[executorch]'",
        )
    if identifier != _IDENTIFIER:
        raise BundleError(f"{path.name} is not an ExecuTorch program", hint=DAMAGED)
    if extended != _EXTENDED or length < _LEAST_LENGTH:
        raise BundleError(f"{path.name} lacks the header that says how long its parts are", hint=DAMAGED)
    end = max(program_size, segments_start + segments_size)
    if not _HEADER.size <= program_size <= (segments_start or program_size) or end > size:
        raise BundleError(
            f"{path.name} is cut off or damaged: it has {size:,} bytes, its header says {end:,}", hint=DAMAGED
        )
