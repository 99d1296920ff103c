"""Building an ONNX program whose weights lie in a file beside it.

The graph is emitted from shapes alone; each external weight gets its place in the file, to be filled afterwards. So emission
takes milliseconds, and weights can be streamed in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["MICROSOFT", "GraphBuilder", "Region", "count_operators"]

MICROSOFT = "com.microsoft"
OPSET, MICROSOFT_OPSET, IR_VERSION = 21, 1, 10
# Regions start at page boundaries, so that a runtime can map them; small ones are packed.
_PAGE_BYTES, _SMALL_BYTES, _SMALL_ALIGNMENT = 4096, 16384, 64
_ITEM_BYTES: dict[int, int] = {
    TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.UINT16: 2, TensorProto.UINT8: 1, TensorProto.INT8: 1,
    TensorProto.INT4: 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Region:
    """A place in the weight file for one array. Shape is in elements, rows first."""

    name: str
    shape: tuple[int, ...]
    item_bytes: int
    offset: int

    @property
    def size_bytes(self) -> int:
        """Size of the whole array."""
        return prod(self.shape) * self.item_bytes

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return self.size_bytes // self.shape[0]

    def part(self, name: str, first_row: int, rows: int) -> Region:
        """Some of its rows."""
        return Region(name, (rows, *self.shape[1:]), self.item_bytes, self.offset + first_row * self.row_bytes)


def count_operators(program: onnx.ModelProto) -> dict[str, int]:
    """How often each operator is in a program, the most frequent first."""
    return dict(Counter(node.op_type for node in program.graph.node).most_common())


@dataclass(slots=True)
class GraphBuilder:
    """Collects nodes and initializers. Names of values are names of tensors: unique, readable, with the layer in front."""

    data_file: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    data_bytes: int = 0

    def op(
        self, kind: str, inputs: Sequence[str], outputs: str | Sequence[str], *, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node; the name of its first output."""
        outputs = [outputs] if isinstance(outputs, str) else list(outputs)
        node = helper.make_node(kind, list(inputs), outputs, name=outputs[0], domain=domain, **attributes)
        self.nodes.append(node)
        return outputs[0]

    def constant(self, name: str, values: NDArray[np.generic]) -> str:
        """A small constant inside the graph: shape inference refuses external shapes and axes."""
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def shared_constant(self, name: str, values: NDArray[np.generic]) -> str:
        """A small constant that several nodes use: added the first time it is asked for."""
        if all(tensor.name != name for tensor in self.initializers):
            self.constant(name, values)
        return name

    def reserve(self, name: str, shape: tuple[int, ...], element_type: int) -> Region:
        """A constant in the weight file. Two numbers of 4 bits, next to each other in a row, are one element of the region."""
        elements = shape
        if element_type == TensorProto.INT4:
            shape = (*shape[:-1], shape[-1] // 2)
        item_bytes = _ITEM_BYTES[element_type]
        size_bytes = prod(shape) * item_bytes
        alignment = _PAGE_BYTES if size_bytes >= _SMALL_BYTES else _SMALL_ALIGNMENT
        offset = -(-self.data_bytes // alignment) * alignment
        self.data_bytes = offset + size_bytes
        region = Region(name, shape, item_bytes, offset)
        self.alias(region, name, elements, element_type)
        return region

    def alias(self, region: Region, name: str, shape: tuple[int, ...], element_type: int) -> str:
        """A constant that is a region's bytes in another shape: two operators share one copy on disk."""
        tensor = onnx.TensorProto(name=name, dims=shape, data_type=element_type, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.data_file), ("offset", region.offset), ("length", region.size_bytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def input(self, name: str, element_type: int, shape: Sequence[int | str]) -> str:
        """Declare a graph input; text in a shape is a length that varies."""
        self.inputs.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def output(self, name: str, element_type: int, shape: Sequence[int | str] | None) -> str:
        """Declare a graph output; without a shape it is left to inference."""
        self.outputs.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def model(self, name: str) -> onnx.ModelProto:
        """The finished program."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, MICROSOFT_OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgekit")
