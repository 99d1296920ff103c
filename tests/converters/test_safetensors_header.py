"""The header of a safetensors file, which may come from anyone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.converters.from_safetensors import read_header
from edgekit.converters.positional_file import PositionalFile
from edgekit.errors import SourceError

ReadLog = Callable[[], list[tuple[str, int, int]]]


def file_with(header: bytes, data: bytes, path: Path, *, length: int | None = None) -> PositionalFile:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return PositionalFile(path)


def entry(begin: int, end: int, *, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data_bytes", "words"),
    [
        ({"a": entry(0, 8)}, 7, "ends at byte"),
        ({"a": entry(0, 8)}, 9, "the file has"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "gap"),
        ({"a": entry(-8, 0)}, 8, "impossible offsets"),
        ({"a": entry(8, 0)}, 8, "takes -8 bytes"),
        ({"a": entry(0, 1 << 63)}, 8, "impossible offsets"),
        ({"a": entry(0, 8, shape=(3,))}, 8, "takes 8 bytes, its shape needs 12"),
        ({"a": entry(0, 8, shape=(1 << 61, 1 << 61))}, 8, "its shape needs"),
        ({"a": entry(0, 8, shape=(-2,))}, 8, "impossible shape"),
        ({"a": entry(0, 8, shape=(True, 2))}, 8, "impossible shape"),
        ({"a": entry(0, 8, shape=[1] * 9)}, 8, "impossible shape"),
        ({"a": entry(0, 8, shape=(2.0,))}, 8, "impossible shape"),
        ({"a": entry(0, 8, dtype="F12")}, 8, "unknown type 'F12'"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "unknown type"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "impossible offsets"),
        ({"a": [1]}, 8, "no description"),
        ({"a\x1b[2J": entry(0, 8)}, 8, "control characters"),
        ([1, 2], 8, "not an object"),
    ],
)
def test_impossible_header_is_refused(header: Any, data_bytes: int, words: str, tmp_path: Path) -> None:
    file = file_with(json.dumps(header).encode(), bytes(data_bytes), tmp_path / "x.safetensors")
    with pytest.raises(SourceError) as caught:
        read_header(file)
    assert words in caught.value.message
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("header", "length", "words"),
    [
        (b"{}", 3, "claims 3 bytes, the file has 10"),
        (b"{}", (1 << 64) - 1, "claims"),
        (b'{"a": 1', None, "not valid JSON"),
        (b'{"a": {}, "a": {}}', None, "not valid JSON"),
        (b"\xff\xfe", None, "not valid JSON"),
        (b'{"a":' * 100_000, None, "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", None, "not valid JSON"),
    ],
)
def test_unreadable_header_is_refused(header: bytes, length: int | None, words: str, tmp_path: Path) -> None:
    file = file_with(header, b"", tmp_path / "x.safetensors", length=length)
    with pytest.raises(SourceError, match=words):
        read_header(file)


@pytest.mark.parametrize("size_bytes", [0, 1, 7])
def test_file_too_short_for_a_header_is_refused(size_bytes: int, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(bytes(size_bytes))
    with pytest.raises(SourceError, match="too short"):
        read_header(PositionalFile(tmp_path / "x.safetensors"))


def test_header_over_the_limit_is_refused_before_it_is_read(tmp_path: Path, log_reads: ReadLog) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((150_000_000).to_bytes(8, "little"))
        file.truncate(200_000_000)  # sparse
    ranges = log_reads()
    with pytest.raises(SourceError, match="claims 150,000,000 bytes"):
        read_header(PositionalFile(path))
    assert sum(size for _, _, size in ranges) == 8
