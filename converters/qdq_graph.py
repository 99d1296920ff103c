"""Two ways of writing one static graph: in floats, to be calibrated, and quantized, for an NPU.

The same emitter draws on either. Each value belongs to a range, named after the value that it was measured at; operators that
only move values keep the range of what they move, as NPUs want it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgekit.quant import WeightFormat

from .onnx_graph import MICROSOFT, GraphBuilder, Region

__all__ = ["Canvas", "Encoding", "FloatCanvas", "Matrix", "MatrixRegions", "QdqCanvas"]

Shape = Sequence[int | str]
Floats = NDArray[np.float32]
_NUMPY_TYPES: dict[int, type[np.unsignedinteger[Any]]] = {8: np.uint8, 16: np.uint16}
_SMALLEST_SCALE = 1e-10  # of a value that is always zero


@dataclass(frozen=True, slots=True)
class Encoding:
    """Whole numbers for floats: float = scale * (number - zero_point)."""

    scale: float
    zero_point: int
    bits: int = 16

    @classmethod
    def of_range(cls, low: float, high: float, bits: int = 16) -> Encoding:
        """The finest encoding of a range; zero is always exact."""
        low, high, steps = min(low, 0.0), max(high, 0.0), 2**bits - 1
        scale = max((high - low) / steps, _SMALLEST_SCALE)
        return cls(scale, min(max(round(-low / scale), 0), steps), bits)

    @classmethod
    def centred(cls, low: float, high: float, bits: int) -> Encoding:
        """The finest encoding of a range whose zero point is in the middle."""
        middle = 2 ** (bits - 1)
        return cls(max(-low / middle, high / (middle - 1), _SMALLEST_SCALE), middle, bits)

    @property
    def low(self) -> float:
        """The smallest float."""
        return -self.scale * self.zero_point

    @property
    def high(self) -> float:
        """The largest float."""
        return self.scale * (int(2**self.bits) - 1 - self.zero_point)

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The whole numbers' type."""
        return _NUMPY_TYPES[self.bits]

    def encode(self, values: Floats) -> NDArray[np.unsignedinteger[Any]]:
        """The nearest numbers, clipped to the range."""
        numbers = np.rint(values / np.float32(self.scale)) + self.zero_point
        encoded: NDArray[np.unsignedinteger[Any]] = np.clip(numbers, 0, 2**self.bits - 1).astype(self.dtype)
        return encoded


@dataclass(frozen=True, slots=True)
class Matrix:
    """A part of a role's weight that is multiplied on its own: `rows` of it from `first_row` on.

    `factor` multiplies it, so that a scale costs no operator.
    """

    name: str
    role: str
    first_row: int
    rows: int
    columns: int
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class MatrixRegions:
    """Where a matrix' arrays go in the weight file: all have the inputs along the first axis, as NPUs multiply."""

    matrix: Matrix
    format: WeightFormat
    values: Region
    row_scales: Region
    block_scales: Region | None = None


class Canvas(ABC):
    """What the emitter draws on. Values are told by their names, which are the same on every canvas."""

    def __init__(self, data_file: str) -> None:
        self.builder = GraphBuilder(data_file)
        self.range_of: dict[str, str] = {}

    @abstractmethod
    def input(self, name: str, shape: Shape, bounds: str) -> str:
        """Declare a graph input that is in a range."""

    @abstractmethod
    def output(self, value: str, shape: Shape) -> None:
        """Declare a graph output."""

    @abstractmethod
    def constant(self, name: str, values: Floats) -> str:
        """Numbers of a norm, a bias, or a factor."""

    @abstractmethod
    def linear(self, value: str, matrix: Matrix, output: str) -> str:
        """value times the transposed matrix."""

    @abstractmethod
    def recode(self, value: str, output: str, bounds: str) -> str:
        """The value in another range."""

    @abstractmethod
    def _add(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        """Add a node; the ranges of its values are known."""

    def op(self, kind: str, inputs: Sequence[str], output: str, *, bounds: str = "", **attributes: Any) -> str:
        """An operator that computes; its output has a range of its own unless one is named."""
        self.range_of[output] = bounds or output
        self._add(kind, inputs, [output], **attributes)
        return output

    def move(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """An operator whose output holds the first input's values, perhaps among others of the same range."""
        return self.op(kind, inputs, output, bounds=self.range_of[inputs[0]], **attributes)

    def split(self, value: str, outputs: Sequence[str], sizes: Sequence[int]) -> Sequence[str]:
        """Parts of a value along its last axis."""
        for output in outputs:
            self.range_of[output] = self.range_of[value]
        self._add("Split", [value, self.shape(sizes)], outputs, axis=-1)
        return outputs

    def shape(self, sizes: Sequence[int]) -> str:
        """A shape, or sizes."""
        return self.builder.shared_constant("shape." + ".".join(map(str, sizes)), np.array(sizes, np.int64))


class FloatCanvas(Canvas):
    """The graph in float32. Weights lie by role, in the rows of the checkpoint."""

    def __init__(self, data_file: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(data_file)
        self.shapes = shapes
        self.roles: dict[str, Region] = {}

    def input(self, name: str, shape: Shape, bounds: str) -> str:
        """See `Canvas.input`."""
        self.range_of[name] = bounds
        return self.builder.input(name, TensorProto.FLOAT, shape)

    def output(self, value: str, shape: Shape) -> None:
        """See `Canvas.output`."""
        self.builder.output(value, TensorProto.FLOAT, shape)

    def constant(self, name: str, values: Floats) -> str:
        """See `Canvas.constant`."""
        return self.builder.shared_constant(name, values)

    def linear(self, value: str, matrix: Matrix, output: str) -> str:
        """See `Canvas.linear`."""
        if matrix.role not in self.roles:
            self.roles[matrix.role] = self.builder.reserve(
                f"{matrix.role}.weight", self.shapes[matrix.role], TensorProto.FLOAT
            )
        part = self.roles[matrix.role].part(f"{matrix.name}.rows", matrix.first_row, matrix.rows)
        self.builder.alias(part, part.name, part.shape, TensorProto.FLOAT)
        self.range_of[output] = output
        return self.builder.op(
            "FusedMatMul", [value, part.name], output, domain=MICROSOFT, transB=1, alpha=matrix.factor
        )

    def recode(self, value: str, output: str, bounds: str) -> str:
        """See `Canvas.recode`: floats stay as they are, and count for the new range."""
        return self.op("Identity", [value], output, bounds=bounds)

    def _add(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        self.builder.op(kind, inputs, outputs, **attributes)


class QdqCanvas(Canvas):
    """The graph with every value quantized: each operator sees dequantized inputs, and its output is quantized.

    Args:
        encodings: Of each range.
        formats: How each role's matrices are kept.
    """

    def __init__(self, data_file: str, encodings: Mapping[str, Encoding], formats: Mapping[str, WeightFormat]) -> None:
        super().__init__(data_file)
        self.encodings, self.formats = encodings, formats
        self.matrices: list[MatrixRegions] = []
        self._constant_encodings: dict[str, Encoding] = {}
        self._known: set[str] = set()

    def input(self, name: str, shape: Shape, bounds: str) -> str:
        """See `Canvas.input`: the graph takes whole numbers."""
        self.range_of[name] = bounds
        return self.builder.input(name, self._element_type(name), shape)

    def output(self, value: str, shape: Shape) -> None:
        """See `Canvas.output`: the graph gives whole numbers."""
        self.builder.output(value, self._element_type(value), shape)

    def constant(self, name: str, values: Floats) -> str:
        """See `Canvas.constant`: 16 bits over their own range."""
        if name not in self.range_of:
            self.range_of[name] = name
            self._constant_encodings[name] = Encoding.of_range(float(values.min()), float(values.max()))
            self.builder.constant(name, self._constant_encodings[name].encode(values))
        return name

    def linear(self, value: str, matrix: Matrix, output: str) -> str:
        """See `Canvas.linear`."""
        regions = self._reserve(matrix, self.formats[matrix.role])
        self.matrices.append(regions)
        self.range_of[output] = output
        weight = self._dequantized_weight(regions)
        self.builder.op("MatMul", [self._dequantized(value), weight], f"{output}.float")
        return self._quantize(output)

    def recode(self, value: str, output: str, bounds: str) -> str:
        """See `Canvas.recode`."""
        self.range_of[output] = bounds
        self.builder.op("QuantizeLinear", [self._dequantized(value), *self._parameters(output)], output)
        return output

    def _add(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        found = [self._dequantized(value) if value in self.range_of else value for value in inputs]
        self.builder.op(kind, found, [f"{output}.float" for output in outputs], **attributes)
        for output in outputs:
            self._quantize(output)

    def _quantize(self, value: str) -> str:
        return self.builder.op("QuantizeLinear", [f"{value}.float", *self._parameters(value)], value)

    def _dequantized(self, value: str) -> str:
        name = f"{value}.dequantized"
        if name not in self._known:
            self._known.add(name)
            self.builder.op("DequantizeLinear", [value, *self._parameters(value)], name)
        return name

    def _encoding(self, value: str) -> Encoding:
        name = self.range_of[value]
        return self._constant_encodings.get(name) or self.encodings[name]

    def _element_type(self, value: str) -> int:
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(self._encoding(value).dtype)))

    def _parameters(self, value: str) -> list[str]:
        """Scale and zero point of a value's range."""
        name, encoding = self.range_of[value], self._encoding(value)
        if name not in self._known:
            self._known.add(name)
            self.builder.constant(f"{name}.scale", np.array(encoding.scale, np.float32))
            self.builder.constant(f"{name}.zero_point", np.array(encoding.zero_point, encoding.dtype))
        return [f"{name}.scale", f"{name}.zero_point"]

    def _reserve(self, matrix: Matrix, form: WeightFormat) -> MatrixRegions:
        builder, name, rows, columns = self.builder, matrix.name, matrix.rows, matrix.columns
        row_scales = builder.reserve(f"{name}.row_scales", (rows,), TensorProto.FLOAT)
        if form.bits == 8:
            values = builder.reserve(f"{name}.weight", (columns, rows), TensorProto.INT8)
            return MatrixRegions(matrix, form, values, row_scales)
        values = builder.reserve(f"{name}.weight", (columns, rows), TensorProto.INT4)
        blocks = builder.reserve(f"{name}.block_scales", (columns // form.block_size, rows), TensorProto.UINT8)
        return MatrixRegions(matrix, form, values, row_scales, blocks)

    def _dequantized_weight(self, regions: MatrixRegions) -> str:
        """The matrix in floats, [columns, rows]. Zero points are all zero, and written since QNN asks for them."""
        builder, name, output = self.builder, regions.matrix.name, f"{regions.matrix.name}.weight.dequantized"
        if not regions.block_scales:
            zeros = self._zeros((regions.matrix.rows,), TensorProto.INT8)
            inputs = [regions.values.name, regions.row_scales.name, zeros]
            return builder.op("DequantizeLinear", inputs, output, axis=1)
        zeros = self._zeros((regions.matrix.rows,), TensorProto.UINT8)
        scales = builder.op(
            "DequantizeLinear", [regions.block_scales.name, regions.row_scales.name, zeros], f"{name}.scales", axis=1
        )
        zeros = self._zeros(regions.block_scales.shape, TensorProto.INT4)
        inputs = [regions.values.name, scales, zeros]
        return builder.op("DequantizeLinear", inputs, output, axis=0, block_size=regions.format.block_size)

    def _zeros(self, shape: tuple[int, ...], element_type: int) -> str:
        name = f"zeros.{element_type}." + ".".join(map(str, shape))
        if name not in self._known:
            self._known.add(name)
            raw = bytes(-(-prod(shape) // (2 if element_type == TensorProto.INT4 else 1)))
            self.builder.initializers.append(helper.make_tensor(name, element_type, shape, raw, raw=True))
        return name
