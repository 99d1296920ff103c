"""Weights of a Core ML package: our own whole numbers and scales as MIL's compressed constants, written once, as they come.

A block of whole numbers becomes `constexpr_blockwise_shift_scale` (scale * (value - offset), iOS 18), a palette
`constexpr_lut_to_dense`; two bits in blocks, which the former has no type for, are looked up first. Nothing is quantized here,
and the file is streamed: the program that is drawn later only points into it, so memory does not grow with the model, and
functions share one copy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from coremltools.converters.mil.backend.mil import helper
from coremltools.converters.mil.backend.mil.load import should_use_weight_file
from coremltools.converters.mil.mil import Builder, types
from coremltools.libmilstoragepython import _BlobStorageWriter
from numpy.typing import NDArray

from edgekit.errors import ConversionError
from edgekit.graph import TensorReport

from .quantize import QuantizedRows
from .stored_weights import StoredMatrix

__all__ = ["IOS_18", "WEIGHT_FILE", "WeightFile", "mil_name", "shifted"]

WEIGHT_FILE = "weight.bin"
# The version of Core ML's specification that packages are written in: the first with states and 4-bit blocks.
IOS_18 = 9
# A block whose offset is this many steps away is flat: its steps, far below half precision's, are dropped.
MOST_STEPS = 1 << 14
_UNSIGNED_TYPES = {2: types.uint2, 4: types.uint4, 6: types.uint6, 8: types.uint8}
_UNSIGNED = {bits: types.nptype_from_builtin(kind) for bits, kind in _UNSIGNED_TYPES.items()}
_SIGNED = {bits: types.nptype_from_builtin(kind) for bits, kind in ((4, types.int4), (8, types.int8))}
Array = NDArray[Any]


def mil_name(name: str) -> str:
    """A name as MIL takes it."""
    return name.replace(".", "_")


@dataclass(frozen=True, slots=True)
class _Constant:
    """An array in the weight file (`values` are then zeros that take no memory), or a small one in the program itself."""

    key: str
    values: Array
    offset: int | None = None

    @property
    def type(self) -> Any:
        """The elements' type, as MIL has it."""
        return types.numpy_type_to_builtin_type(self.values.dtype)

    @property
    def size_bytes(self) -> int:
        """Packed."""
        return -(-self.values.size * int(self.type.get_bitwidth()) // 8)

    def draw(self) -> Any:
        """The constant in the function that is being drawn."""
        drawn = Builder.const(val=self.values, name=self.key)
        drawn.op.weight_id = self.key
        return drawn


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix or a vector: floats, or whole numbers with scales and offsets, two bits by way of a table."""

    values: _Constant
    scales: _Constant | None = None
    offsets: _Constant | None = None
    table: _Constant | None = None

    @property
    def size_bytes(self) -> int:
        constants = (self.values, self.scales, self.offsets, self.table)
        return sum(constant.size_bytes for constant in constants if constant)

    def draw(self, name: str) -> Any:
        """The matrix in the function that is being drawn."""
        values = self.values.draw()
        if self.table:
            last = name if self.scales is None else f"{name}_looked_up"
            values = Builder.constexpr_lut_to_dense(indices=values, lut=self.table.draw(), name=last)
        if self.scales is None:
            return values
        offsets = self.offsets.draw() if self.offsets else None
        return Builder.constexpr_blockwise_shift_scale(data=values, scale=self.scales.draw(), offset=offsets, name=name)


class WeightFile:
    """The package's weight file, filled role by role, and what lies where in it.

    Args:
        path: Where to write it.
        float_type: What the program computes in, float16 or float32: scales, and all that is no matrix, are kept so too.
    """

    def __init__(self, path: Path, float_type: type[np.floating[Any]]) -> None:
        self.float_type = float_type
        self._path, self._writer = path, _BlobStorageWriter(str(path))
        self._matrices: dict[str, _Matrix] = {}
        self._constants: dict[str, _Constant] = {}

    def add(self, stored: StoredMatrix) -> tuple[str, TensorReport]:
        """Write a matrix; the key that it is drawn by, and how it was stored.

        Raises:
            ConversionError: A weight or a scale is too large for half precision, or blocks do not divide the rows.
        """
        key, number = f"{mil_name(stored.role)}_weight", 0
        while key in self._matrices:  # a role's weight may be stored in several matrices
            number += 1
            key = f"{mil_name(stored.role)}_weight_{number}"
        matrix = self._matrices[key] = self._matrix(key, stored)
        bits = int(matrix.values.type.get_bitwidth())
        return key, replace(stored.report, size_bytes=matrix.size_bytes, bits=bits)

    def draw(self, key: str) -> Any:
        """A matrix as a constant in the function that is being drawn."""
        return self._matrices[key].draw(key)

    def draw_array(self, name: str, values: Array) -> Any:
        """An array that is no matrix (a rotary table, a norm's weight), written when it is first drawn."""
        key = mil_name(name)
        if key not in self._constants:
            self._write(key, self._floats(name, values))
        return self._constants[key].draw()

    def close(self) -> None:
        """Complete the file: coremltools' writer does that when it goes, and says nothing of errors.

        Raises:
            ConversionError: The disk is full.
        """
        del self._writer
        with self._path.open("rb") as handle:
            written = int.from_bytes(handle.read(4), "little")
        if written != sum(constant.offset is not None for constant in self._constants.values()):
            raise _not_written()

    def places(self) -> dict[str, Any]:
        """For MIL's exporter: where each array lies in the file, by its key."""
        return {
            constant.key: helper.create_file_value_tensor(
                f"@model_path/weights/{WEIGHT_FILE}",
                constant.offset,
                constant.values.shape,
                helper.types_to_proto_primitive(constant.type),
            )
            for constant in self._constants.values()
            if constant.offset is not None
        }

    def _matrix(self, name: str, stored: StoredMatrix) -> _Matrix:
        rows, bits = stored.rows, stored.plan.format.bits
        if not isinstance(rows, QuantizedRows):
            return _Matrix(self._write(f"{name}_values", self._floats(stored.role, rows)))
        count, columns = stored.plan.shape
        if rows.tables is not None:
            table = self._floats(stored.role, rows.tables)[
                :, None, :, None
            ]  # [groups of rows, 1 of columns, values, 1]
            values = rows.values.reshape(count, columns).astype(_UNSIGNED[bits])
            of_rows = self._write(f"{name}_scales", self._floats(stored.role, rows.scales))
            return _Matrix(self._write(f"{name}_values", values), of_rows, table=self._write(f"{name}_table", table))
        if rows.values[0].size != columns:
            raise ConversionError(
                f"{stored.role}: blocks of {rows.values.shape[-1]} do not divide its rows of {columns}, as Core ML needs",
                hint="use a recipe with a smaller block size",
            )
        values, scales, offsets = shifted(rows, bits)
        return _Matrix(
            self._write(f"{name}_values", values.reshape(count, columns)),
            self._write(f"{name}_scales", self._floats(stored.role, scales)),
            None if offsets is None else self._write(f"{name}_offsets", self._floats(stored.role, offsets)),
            self._write(f"{name}_table", np.arange(4, dtype=self.float_type).reshape(1, 1, 4, 1))
            if bits == 2
            else None,
        )

    def _floats(self, name: str, values: Array) -> Array:
        """The values in the program's precision, where they are floats."""
        if values.dtype.kind != "f":
            return values
        with np.errstate(over="ignore"):
            floats = values.astype(self.float_type)
        if not np.isfinite(floats).all():
            raise ConversionError(
                f"{name} holds values over {np.finfo(self.float_type).max:,.0f}, the most that half precision has",
                hint="use --quant fp32, which runs without the Neural Engine, or --format onnx",
            )
        return floats

    def _append(self, written: Any) -> int:
        try:
            return int(helper._get_offset_by_writing_data(written, self._writer))
        except RuntimeError as error:
            raise _not_written() from error

    def _write(self, key: str, values: Array) -> _Constant:
        constant = _Constant(key, values)
        if should_use_weight_file(values, IOS_18):
            written = SimpleNamespace(val=values, dtype=constant.type)
            offset = self._append(written)
            constant = _Constant(key, np.broadcast_to(np.zeros((), values.dtype), values.shape), offset)
        self._constants[key] = constant
        return constant


def _not_written() -> ConversionError:
    return ConversionError(f"{WEIGHT_FILE} can't be written", hint="free some space, or use --out")


def shifted(rows: QuantizedRows, bits: int) -> tuple[Array, Array, Array | None]:
    """Values, scales and offsets so that a weight is scale * (value - offset); no offsets: zero, of signed values."""
    middle = 1 << (bits - 1)
    if rows.offsets is not None or bits == 2:
        return _with_float_offsets(rows, bits, np.float32(middle) if rows.zero_points is None else rows.zero_points)
    if rows.zero_points is None:
        signed = (rows.values.astype(np.int16) - middle).astype(_SIGNED[bits])
        return signed, rows.scales, None
    return rows.values.astype(_UNSIGNED[bits]), rows.scales, rows.zero_points.astype(_UNSIGNED[bits])


def _with_float_offsets(rows: QuantizedRows, bits: int, zero_points: Any) -> tuple[Array, Array, Array]:
    """A float that is added to a block (a checkpoint's minimum) is so many steps off its zero."""
    values, scales = rows.values.astype(_UNSIGNED[bits]), rows.scales.copy()
    offsets = np.broadcast_to(np.asarray(zero_points, np.float32), scales.shape).copy()
    if rows.offsets is not None:
        flat = np.abs(rows.offsets) > MOST_STEPS * np.abs(scales)
        scales[flat] = rows.offsets[flat]
        offsets = offsets - np.divide(rows.offsets, scales, out=np.zeros_like(scales), where=scales != 0)
        values[flat], offsets[flat] = 0, -1
    return values, scales, offsets
