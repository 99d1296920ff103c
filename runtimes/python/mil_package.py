"""An .mlpackage on disk: its manifest, its model's message and the blobs beside it. All of it is untrusted.

The layout is coremltools': `Manifest.json` names the model's file under `Data`; the model is a protobuf message
(MIL.proto, Model.proto); large constants lie in blob files (StorageFormat.hpp: a header of 64 bytes, then for each blob 64
bytes that say its type, size and place).
"""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from edgekit.errors import BundleError, MissingExtraError

from .mil_types import BITS, HELD, ArrayLike, TensorType

__all__ = ["BROKEN", "Package", "model_messages", "unpack"]

BROKEN = "the package is damaged or was not made by EdgeKit; convert the model again"
LARGEST_MANIFEST_BYTES = 1_000_000
LARGEST_MODEL_BYTES = (1 << 31) - 1  # of a protobuf message
_MODEL_PATH = "@model_path/"
_MESSAGES = "edgekit.runtimes._coreml_messages"
_ALIGNMENT = 64
_SENTINEL = 0xDEADBEEF
_BLOB_TYPES = {
    1: "float16", 2: "float32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1", 10: "uint2",
    11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip


class Package:
    """An open package.

    Args:
        directory: The .mlpackage.

    Attributes:
        model: The protobuf message, of `CoreML.Specification.Model`.

    Raises:
        BundleError: It is not a package, or its model can't be read.
        MissingExtraError: coremltools is not installed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        path = self._inside(directory / "Data", _model_item(directory))
        self._beside = path.parent
        try:
            if path.stat().st_size > LARGEST_MODEL_BYTES:
                raise BundleError(f"{path.name} is too large to be a model", hint=BROKEN)
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{directory.name}: its model {path.name} can't be read", hint=BROKEN) from error
        self.model = model_messages().Model_pb2.Model()
        try:
            self.model.ParseFromString(data)
        except Exception as error:  # DecodeError, or RuntimeError from older protobufs
            raise BundleError(f"{path.name} is not a Core ML model: {error}", hint=BROKEN) from error

    def read_blob(self, file_name: str, offset: int, kind: TensorType) -> ArrayLike:
        """A constant from a blob file.

        Args:
            file_name: As the model names it, from `@model_path`.
            offset: Of the blob's 64 bytes of description.
            kind: What the model says it is.

        Returns:
            The array as `mil_types` says that it is held.

        Raises:
            BundleError: The file is missing or too short, or holds another type or size there.
        """
        if not file_name.startswith(_MODEL_PATH):
            raise BundleError(f"{self._directory.name} reads weights from {file_name[:80]!r}", hint=BROKEN)
        path = self._inside(self._beside, file_name.removeprefix(_MODEL_PATH))
        try:
            with path.open("rb") as handle:
                start, size_bytes = _find_blob(handle, offset, kind)
                handle.seek(start)
                data = np.frombuffer(handle.read(size_bytes), np.uint8)
        except (OSError, ValueError, OverflowError, struct.error) as error:
            raise BundleError(f"{path.name}: the blob at {offset} can't be read", hint=BROKEN) from error
        return unpack(data, kind)

    def _inside(self, base: Path, name: str) -> Path:
        """A file of the package by its relative path."""
        plain = name and "\\" not in name and ":" not in name and "\0" not in name
        parts = PurePosixPath(name).parts
        path = base.joinpath(*parts)
        if not plain or ".." in parts or not path.resolve().is_relative_to(self._directory.resolve()):
            raise BundleError(f"{self._directory.name} names {name[:80]!r}, which lies outside of it", hint=BROKEN)
        return path


@cache
def model_messages() -> Any:
    """coremltools' protobuf classes, `coremltools.proto`, without the rest of coremltools.

    That imports PyTorch, scikit-learn and more where they are installed: ten seconds and half a gigabyte.

    Raises:
        MissingExtraError: coremltools is not installed.
    """
    found = importlib.util.find_spec("coremltools")
    if found is None or found.origin is None:
        raise MissingExtraError("coremltools", "coreml")
    folder = Path(found.origin).parent / "proto"
    spec = importlib.util.spec_from_file_location(
        _MESSAGES, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise MissingExtraError("coremltools", "coreml")
    module = sys.modules[_MESSAGES] = importlib.util.module_from_spec(spec)  # its parts import each other from there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_MESSAGES]
        raise
    return module


def unpack(data: ArrayLike, kind: TensorType) -> ArrayLike:
    """Elements from their bytes: little-endian, those of fewer than 8 bits packed from the lowest bit on.

    Args:
        data: uint8 [bytes].

    Raises:
        ValueError: There are too few or too many bytes.
    """
    bits, count = BITS[kind.dtype], kind.count
    if min(kind.shape, default=0) < 0 or data.size != -(-count * bits // 8):
        raise ValueError(f"{data.size} bytes for {kind}")
    if bits >= 8:
        stored = np.float16 if kind.dtype == "float16" else HELD[kind.dtype]
        values = data.view(np.dtype(stored).newbyteorder("<")).astype(HELD[kind.dtype])
    elif bits == 4:
        values = np.stack((data & 15, data >> 4), axis=-1).reshape(-1)[:count]
    else:
        each = np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits)
        values = (each << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    if kind.dtype == "int4":
        values = (values.astype(np.int8) ^ 8) - np.int8(8)
    return values.reshape(kind.shape)


def _model_item(directory: Path) -> str:
    """The path of the model's file under `Data`, as the manifest has it."""
    path = directory / "Manifest.json"
    try:
        if path.stat().st_size > LARGEST_MANIFEST_BYTES:
            raise BundleError(f"{directory.name}: Manifest.json is too large to be one", hint=BROKEN)
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return str(manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{directory.name} is not a Core ML package: no usable Manifest.json", hint=BROKEN) from error


def _find_blob(handle: Any, offset: int, kind: TensorType) -> tuple[int, int]:
    """Where a blob's data starts, and its bytes."""
    length = handle.seek(0, 2)
    handle.seek(0)
    _, version = struct.unpack("<II", handle.read(8))
    if version != 2 or offset % _ALIGNMENT or not _ALIGNMENT <= offset <= length - _ALIGNMENT:
        raise ValueError("no blob file, or no blob there")
    handle.seek(offset)
    sentinel, stored, size_bytes, start = struct.unpack("<IIQQ", handle.read(24))
    if sentinel != _SENTINEL or _BLOB_TYPES.get(stored) != kind.dtype:
        raise ValueError("another type of blob, or none")
    if not _ALIGNMENT <= start <= length or size_bytes > length - start:
        raise ValueError("it reaches past the end of the file")
    return start, size_bytes
