"""The header of a GGUF file (versions 2 and 3, little-endian), parsed with every length checked against the file."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf

from edgekit.errors import SourceError, UnsupportedError

from .positional_file import PositionalFile

__all__ = ["GgufHeader", "TensorEntry", "read_gguf_header"]

_DAMAGED = "the file is damaged, incomplete or not a GGUF file; fetch it again"
_CHUNK_BYTES = 1 << 20
_LARGEST_HEADER_BYTES = 1 << 28  # a vocabulary of 262,144 tokens with its merges takes some 20 MB
_MOST_ITEMS = 1 << 22  # of one array
_MOST_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: Mapping[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's line in the header. `shape` is rows first, `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata, tensors in file order, and where the tensor data starts."""

    metadata: Mapping[str, Any]
    tensors: tuple[TensorEntry, ...]
    data_start: int


class _Cursor:
    """Reads little-endian values one after the other, growing its window of the file as needed."""

    def __init__(self, file: PositionalFile) -> None:
        self.file = file
        self.position = 0
        self._window = b""

    def take(self, size_bytes: int) -> bytes:
        end = self.position + size_bytes
        if end > min(self.file.size_bytes, _LARGEST_HEADER_BYTES):
            raise SourceError(
                f"{self.file.path.name}: the header runs to byte {end:,}, the file has {self.file.size_bytes:,}",
                hint=_DAMAGED,
            )
        if end > len(self._window):
            wanted = min(max(end, 2 * len(self._window), _CHUNK_BYTES), self.file.size_bytes)
            start = len(self._window)
            self._window += self.file.read(start, wanted - start).tobytes()
        piece = self._window[self.position : end]
        self.position = end
        return piece

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, smallest_item_bytes: int) -> int:
        """A number of items that must all fit into the rest of the file."""
        count: int = self.scalar("Q")
        if count * smallest_item_bytes > self.file.size_bytes - self.position:
            raise SourceError(f"{self.file.path.name}: a count of {count:,} is more than the file holds", hint=_DAMAGED)
        return count

    def _items(self, item_bytes: int) -> int:
        count = self.count(item_bytes)
        if count > _MOST_ITEMS:
            raise SourceError(f"{self.file.path.name}: an array of {count:,} items is too long", hint=_DAMAGED)
        return count

    def text(self) -> str:
        length = self.count(1)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            # Vocabularies hold byte pieces that are no valid UTF-8; they matter only to byte-level readers.
            return self._window[self.position - length : self.position].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise SourceError(f"{self.file.path.name}: metadata of the unknown type {kind}", hint=_DAMAGED)
        value = self.scalar(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value

    def _array(self) -> list[Any]:
        kind = self.scalar("I")
        if kind == _STRING:
            return [self.text() for _ in range(self._items(8))]
        if kind not in _SCALARS:
            raise SourceError(f"{self.file.path.name}: an array of the unknown type {kind}", hint=_DAMAGED)
        item = struct.calcsize(_SCALARS[kind])
        count = self._items(item)
        values = struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(count * item))
        return [bool(value) for value in values] if kind == _BOOL else list(values)


def read_gguf_header(file: PositionalFile) -> GgufHeader:
    """Parse the header.

    Raises:
        SourceError: It is truncated, malformed or hostile.
        UnsupportedError: Its version or a tensor type is not handled.
    """
    cursor = _Cursor(file)
    if cursor.take(4) != b"GGUF":
        raise SourceError(f"{file.path.name} is not a GGUF file", hint=_DAMAGED)
    version = cursor.scalar("I")
    if version not in {2, 3}:
        swapped = version & 0xFFFF == 0
        what = "is big-endian" if swapped else f"is GGUF version {version}"
        raise UnsupportedError(
            f"{file.path.name} {what}, which is not read", hint="convert it to GGUF 3, little-endian"
        )
    tensor_count = cursor.count(8 + 4 + 4 + 8)
    metadata_count = cursor.count(8 + 4 + 1)
    metadata = dict(_unique(file, metadata_count, lambda: _pair(cursor)))
    tensors = dict(_unique(file, tensor_count, lambda: _entry(cursor)))
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise SourceError(f"{file.path.name}: an alignment of {alignment!r} is impossible", hint=_DAMAGED)
    data_start = -(-cursor.position // alignment) * alignment
    return GgufHeader(metadata, tuple(tensors.values()), data_start)


def _unique(file: PositionalFile, count: int, read: Callable[[], tuple[str, Any]]) -> list[tuple[str, Any]]:
    pairs = [read() for _ in range(count)]
    if len({name for name, _ in pairs}) != count:
        raise SourceError(f"{file.path.name}: a name stands twice in the header", hint=_DAMAGED)
    return pairs


def _pair(cursor: _Cursor) -> tuple[str, Any]:
    return cursor.text(), cursor.value(cursor.scalar("I"))


def _entry(cursor: _Cursor) -> tuple[str, TensorEntry]:
    file_name = cursor.file.path.name
    name = cursor.text()
    if not name.isprintable():
        raise SourceError(f"{file_name}: tensor {name[:80]!r} has a name with control characters", hint=_DAMAGED)
    dimensions = cursor.scalar("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise SourceError(f"{file_name}: tensor {name[:80]!r} has {dimensions} dimensions", hint=_DAMAGED)
    sizes = [cursor.scalar("Q") for _ in range(dimensions)]
    if not all(0 < size < 1 << 40 for size in sizes):
        raise SourceError(f"{file_name}: tensor {name[:80]!r} has the impossible shape {sizes}", hint=_DAMAGED)
    kind = cursor.scalar("I")
    try:
        dtype = gguf.GGMLQuantizationType(kind).name
    except ValueError as error:
        raise UnsupportedError(
            f"{file_name}: tensor {name[:80]!r} is of the unknown type {kind}", hint="use a common type such as Q8_0"
        ) from error
    return name, TensorEntry(name, tuple(reversed(sizes)), dtype, cursor.scalar("Q"))
