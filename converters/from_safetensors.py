"""Reading a Hugging Face directory: config, tokenizer, and single or sharded safetensors files.

The format: 8 bytes of little-endian header length, a JSON header, then the tensors
(https://huggingface.co/docs/safetensors). Headers are untrusted: every length and offset is checked before it is used.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import SourceError, UnsupportedError
from edgekit.source import Provenance, Source, StoredBlocks, Tensor

from .assemble import assemble_source
from .hf_tokenizer import read_licence, tokenizer_from_directory
from .json_files import read_json
from .positional_file import PositionalFile
from .prequantized import combine_packed
from .text_part import text_part

__all__ = ["SafetensorsTensor", "open_directory", "read_header"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
LARGEST_RANK = 8
LONGEST_FILE_NAME = 255
_DAMAGED = "the file is damaged or not a safetensors file; fetch it again"
_NUMPY_TYPES: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """One tensor of a safetensors file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    file: PositionalFile
    offset: int

    @property
    def exact_format(self) -> None:
        """None: these are floats."""
        return None

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) as float32.

        Raises:
            UnsupportedError: The stored type is not a float this reader knows.
        """
        if self.dtype not in _NUMPY_TYPES:
            raise UnsupportedError(
                f"{self.file.path.name}: tensor {self.name} is stored as {self.dtype}, which is not read yet",
                hint=f"use a checkpoint in {', '.join(_NUMPY_TYPES)}",
            )
        rows = self.shape[0] if self.shape else 1
        stop = rows if stop is None else stop
        row_bytes = self.size_bytes // max(rows, 1)
        data = self.file.read(self.offset + start * row_bytes, (stop - start) * row_bytes)
        shape = (stop - start, *self.shape[1:])
        values = data.view(_NUMPY_TYPES[self.dtype]).reshape(shape)
        if self.dtype == "BF16":  # bfloat16 is the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which the writer refuses
            return values.astype(np.float32, copy=False)

    def read_blocks(self, start: int, stop: int) -> StoredBlocks:
        """Never called: `exact_format` is None."""
        raise TypeError(f"{self.name} holds no blocks")


def read_header(file: PositionalFile) -> dict[str, SafetensorsTensor]:
    """All tensors of one file, checked against its size.

    Raises:
        SourceError: The header is truncated, malformed or points outside the file.
    """
    name = file.path.name
    if file.size_bytes < 8:
        raise SourceError(f"{name} is too short for a safetensors file ({file.size_bytes} bytes)", hint=_DAMAGED)
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if length > min(file.size_bytes - 8, LARGEST_HEADER_BYTES):
        raise SourceError(
            f"{name}: the header claims {length:,} bytes, the file has {file.size_bytes:,}", hint=_DAMAGED
        )
    try:
        header = json.loads(file.read(8, length).tobytes().decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name}: the header is not valid JSON", hint=_DAMAGED) from error
    if not isinstance(header, dict):
        raise SourceError(f"{name}: the header is not an object", hint=_DAMAGED)
    header.pop("__metadata__", None)
    tensors = {key: _tensor(file, key, entry, 8 + length) for key, entry in header.items()}
    _check_layout(file, tensors, 8 + length)
    return tensors


def _check_layout(file: PositionalFile, tensors: Mapping[str, SafetensorsTensor], data_start: int) -> None:
    """The format wants the tensors side by side, from the header to the end of the file."""
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.size_bytes)):
        if tensor.offset != end:
            what = "overlaps another" if tensor.offset < end else "leaves a gap before it"
            raise SourceError(f"{file.path.name}: tensor {tensor.name!r} {what}", hint=_DAMAGED)
        end += tensor.size_bytes
    if end != file.size_bytes:
        raise SourceError(
            f"{file.path.name}: the tensors end at byte {end:,}, the file has {file.size_bytes:,}", hint=_DAMAGED
        )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key stands twice")
    return keys


def _tensor(file: PositionalFile, key: str, entry: object, data_start: int) -> SafetensorsTensor:
    def wrong(what: str) -> SourceError:
        return SourceError(f"{file.path.name}: tensor {key[:80]!r} {what}", hint=_DAMAGED)

    if not key.isprintable():
        raise wrong("has a name with control characters")
    if not isinstance(entry, dict):
        raise wrong("has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise wrong(f"has the unknown type {reprlib.repr(dtype)}")
    if not _are_sizes(shape, LARGEST_RANK):
        raise wrong("has an impossible shape")
    if not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise wrong("has impossible offsets")
    begin, end = offsets
    size_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != size_bytes:
        raise wrong(f"takes {end - begin:,} bytes, its shape needs {size_bytes:,}")
    if data_start + end > file.size_bytes:
        raise wrong(f"ends at byte {data_start + end:,}, the file has {file.size_bytes:,}")
    return SafetensorsTensor(key, tuple(shape), dtype, size_bytes, file, data_start + begin)


def _are_sizes(values: object, most: int) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62 for value in values)
    )


def open_directory(directory: str | Path, *, name: str | None = None, revision: str | None = None) -> Source:
    """Open a directory as Hugging Face lays it out.

    Args:
        directory: Has config.json, a tokenizer and *.safetensors.
        name: Of the model in the provenance; the directory's own by default.
        revision: The hub commit, where known.

    Raises:
        SourceError, UnsupportedError: See `edgekit.source.open_source`.
    """
    directory = Path(directory)
    config: Mapping[str, Any] = read_json(directory / "config.json")
    files = _weight_files(directory)
    stored: dict[str, SafetensorsTensor] = {}
    for path in files:
        found = read_header(PositionalFile(path))
        twice = sorted(set(found) & set(stored))
        if twice:
            raise SourceError(
                f"{directory}: tensor {twice[0]} is in {path.name} and in another file ({len(twice)} such tensors)",
                hint="keep the files of one download only",
            )
        stored |= found
    _check_index(directory, files, stored)
    tensors = combine_packed(config, directory, stored)
    config, origin, kept, notes = text_part(config, str(directory / "config.json"), tensors)
    tokenizer = tokenizer_from_directory(directory, config)
    provenance = Provenance("safetensors", name or directory.resolve().name, revision, read_licence(directory))
    return assemble_source(config, origin, kept, tokenizer, provenance=provenance, weight_files=files, notes=notes)


def _weight_files(directory: Path) -> tuple[Path, ...]:
    single, index_path = directory / SINGLE, directory / INDEX
    if single.is_file():  # first, as in transformers; beside it some publishers keep the weights in another layout
        return (single,)
    if index_path.is_file():
        names = sorted(set(_weight_map(index_path).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise SourceError(
                f"{directory}: shard {missing[0]} is missing ({len(missing)} of {len(names)})",
                hint="download the checkpoint again; every shard that the index names is needed",
            )
        return tuple(directory / name for name in names)
    files = tuple(sorted(directory.glob("*.safetensors")))
    if files:
        return files
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        raise UnsupportedError(
            f"{directory} holds pickled PyTorch weights, which can run code when read",
            hint="use the safetensors version of the model",
        )
    if any(directory.glob("*.gguf")):
        raise SourceError(f"{directory} holds GGUF files, no safetensors", hint="give the .gguf file itself")
    raise SourceError(f"{directory} holds no *.safetensors file", hint="download the weights as well as the config")


def _weight_map(index_path: Path) -> dict[str, str]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index_path} has no weight_map", hint="download the index again")
    for name in weight_map.values():
        if not _is_plain_name(name):
            raise SourceError(
                f"{index_path} names the shard {reprlib.repr(name)}, which is not a plain file name",
                hint="download the index again",
            )
    return weight_map


def _is_plain_name(name: object) -> bool:
    if not isinstance(name, str) or len(name.encode("utf-8", "replace")) > LONGEST_FILE_NAME:
        return False
    plain = name == Path(name).name and name.isprintable() and not set(name) & set("\\/:")
    return plain and name.endswith(".safetensors")


def _check_index(directory: Path, files: tuple[Path, ...], tensors: Mapping[str, Tensor]) -> None:
    index_path = directory / INDEX
    if directory / SINGLE in files or not index_path.is_file():
        return
    absent = sorted(set(_weight_map(index_path)) - set(tensors))
    if absent:
        raise SourceError(
            f"{index_path.name} names the tensor {absent[0]}, which no shard holds ({len(absent)} such)",
            hint="the shards and the index are from different downloads; fetch both again",
        )
