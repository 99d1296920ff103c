"""Sessions on disk: one file of tokens and cache, bound to the bundle that computed it.

    8 bytes    "EDGEKIT" and a zero byte
    8 bytes    length of the header, little-endian
    header     JSON: see `_Header`
    tokens     int32 little-endian, all of them
    cache      key and value of each layer in turn, [kv_heads, tokens - forgotten, head_dim], little-endian
    32 bytes   SHA-256 of all before

A file is untrusted: the header must be what the model expects, and the file's size what the header says, before anything
is allocated; nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import Bundle, Program
from edgekit.errors import GenerationError

from .sequence import TokenSequence

__all__ = ["bundle_identity", "read_session", "write_session"]

MAGIC = b"EDGEKIT\0"
FORMAT_VERSION = 1
LARGEST_HEADER_BYTES = 65_536
_TOKEN = np.dtype("<i4")
_HINT = "save the session again with this version of EdgeKit"


def bundle_identity(bundle: Bundle, program: Program) -> str:
    """A hash of what tokens and caches depend on: the program's files and the tokenizer."""
    names = (*program.graph.files, "tokenizer.json")
    hashes = {name: bundle.manifest.files[name].get("sha256") for name in names}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Header:
    """What a file says of itself: the bundle's identity, how many tokens, how many of them have left the cache."""

    format_version: int
    bundle: str
    tokens: int
    forgotten: int
    long_rope: bool


def write_session(path: Path, sequence: TokenSequence, identity: str) -> None:
    """Write a sequence aside and rename it.

    Raises:
        GenerationError: It can't be written.
    """
    tokens, forgotten, long_rope, cache = sequence.snapshot()
    header = json.dumps(asdict(_Header(FORMAT_VERSION, identity, len(tokens), forgotten, long_rope))).encode()
    parts = (MAGIC, len(header).to_bytes(8, "little"), header, _bytes_of(np.array(tokens, _TOKEN)))
    digest = hashlib.sha256()
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                for part in itertools.chain(parts, map(_bytes_of, cache)):
                    digest.update(part)
                    file.write(part)
                file.write(digest.digest())
                file.close()
                os.replace(file.name, path)
            except BaseException:
                file.close()
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise GenerationError(
            f"the session can't be saved to {path}: {error.strerror or error}", hint="check the path and the free space"
        ) from error


def read_session(path: Path, sequence: TokenSequence, program: Program, identity: str) -> None:
    """Fill an empty sequence with a saved one.

    Raises:
        GenerationError: The file can't be read, is damaged, or of another bundle or version.
    """
    try:
        with path.open("rb") as file:
            _Reader(file, path, program).read_into(sequence, identity)
    except OSError as error:
        raise GenerationError(f"the session {path} can't be read: {error.strerror or error}", hint=_HINT) from error


class _Reader:
    """Reads a file that is not trusted."""

    def __init__(self, file: BinaryIO, path: Path, program: Program) -> None:
        self._file, self._path, self._program = file, path, program
        self._digest = hashlib.sha256()
        self._left = os.fstat(file.fileno()).st_size

    def read_into(self, sequence: TokenSequence, identity: str) -> None:
        layout = self._program.graph.cache
        header = self._header(identity)
        shape = (layout.kv_heads, header.tokens - header.forgotten, layout.head_dim)
        kind = np.dtype(layout.dtype).newbyteorder("<")
        size = header.tokens * _TOKEN.itemsize + 2 * layout.layers * math.prod(shape) * kind.itemsize
        if self._left != size + self._digest.digest_size:
            raise self._damaged("its size is not what its header says")
        tokens = self._array((header.tokens,), _TOKEN)
        cache = [self._array(shape, kind) for _ in range(2 * layout.layers)]
        if self._file.read() != self._digest.digest():
            raise self._damaged("its SHA-256 is another")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self._program.graph.vocab_size:
            raise self._damaged("it has tokens that the model does not have")
        sequence.load([int(token) for token in tokens], header.forgotten, header.long_rope, cache)

    def _header(self, identity: str) -> _Header:
        if self._bytes(len(MAGIC)) != MAGIC:
            raise self._damaged("it is not a saved session")
        size = int.from_bytes(self._bytes(8), "little")
        if size > LARGEST_HEADER_BYTES:
            raise self._damaged("its header is too large")
        try:
            values = json.loads(self._bytes(size))
        except (ValueError, RecursionError) as error:
            raise self._damaged("its header is not JSON") from error
        names = {field.name for field in fields(_Header)}
        if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
            raise self._damaged("it has another format version")
        if values.keys() != names or not all(type(values[name]) is kind for name, kind in _KINDS.items()):
            raise self._damaged("its header is malformed")
        header = _Header(**values)
        if header.bundle != identity:
            raise GenerationError(
                f"the session {self._path} is of another bundle",
                hint="restore it with the bundle that it was saved with",
            )
        self._check(header)
        return header

    def _check(self, header: _Header) -> None:
        """Hold the header against what the program can do."""
        graph, context = self._program.graph, self._program.context
        slid = header.forgotten > 0
        possible = (
            0 <= header.forgotten <= header.tokens
            and header.tokens - header.forgotten <= context
            and header.tokens <= max(context, graph.positions)
            and (not slid or (graph.positions and header.tokens - header.forgotten >= graph.window - 1))
            and (not header.long_rope or graph.rope_switch)
        )
        if not possible:
            raise self._damaged("its header contradicts the model")

    def _array(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> NDArray[Any]:
        data = self._bytes(math.prod(shape) * kind.itemsize)
        return np.frombuffer(data, kind).reshape(shape)

    def _bytes(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self._left else b""
        if len(data) != count:
            raise self._damaged("it ends too early")
        self._left -= count
        self._digest.update(data)
        return data

    def _damaged(self, why: str) -> GenerationError:
        return GenerationError(f"the session {self._path} can't be restored: {why}", hint=_HINT)


_KINDS = {"bundle": str, "tokens": int, "forgotten": int, "long_rope": bool}


def _bytes_of(array: NDArray[Any]) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
