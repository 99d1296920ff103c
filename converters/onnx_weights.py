"""A decoder's weights as ONNX operators: products, lookups, and the places in the weight file that they read.

A weight's blocks may have offsets (see `WeightFormat`), which MatMulNBits knows only in a form that is fifty times slower. So
they are multiplied apart: a row's product with them is that of the sums of its input's blocks, which costs a quarter of
the bytes that 4-bit blocks take and adds no rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from edgekit.plan import WeightPlan

from .onnx_graph import MICROSOFT, GraphBuilder, Region

__all__ = ["StoredWeights", "WeightRegions"]


@dataclass(frozen=True, slots=True)
class WeightRegions:
    """Where the arrays of one matrix go: `values` alone for floats; for blocks the others that their format has."""

    values: Region
    scales: Region | None = None
    zero_points: Region | None = None
    offsets: Region | None = None

    @property
    def arrays(self) -> tuple[Region, ...]:
        """Those that there are."""
        places = (self.values, self.scales, self.zero_points, self.offsets)
        return tuple(region for region in places if region)

    @property
    def size_bytes(self) -> int:
        """Size of all of them."""
        return sum(region.size_bytes for region in self.arrays)


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Operators on the weights of a decoder, by role.

    Attributes:
        graph: Where they are added.
        plans: How each weight is stored.
        float_type: ONNX's type of activations and of weights that are floats.
        accuracy_level: Of MatMulNBits.
        regions: One for each matrix that a role is kept as, reserved on first use (the tied head asks for the embedding's
            again).
    """

    graph: GraphBuilder
    plans: Mapping[str, WeightPlan]
    float_type: int
    accuracy_level: int
    regions: dict[str, tuple[WeightRegions, ...]] = field(default_factory=dict)
    _sums: dict[tuple[str, int], str] = field(default_factory=dict)

    def vector(self, role: str) -> str:
        """A norm's weight or a bias."""
        return self._regions(role)[0].values.name

    def product(self, role: str, value: str, output: str) -> str:
        """value [1, new, columns] times the role's weight, and its bias where it has one."""
        plan, regions = self.plans[role], self._regions(role)
        bias = self.vector(role + "_bias") if role + "_bias" in self.plans else ""
        if not plan.pieces:
            return self._matrix(plan, regions[0], value, bias, output)
        products = [
            self._matrix(piece, region, value, "", f"{output}.{index}")
            for index, (piece, region) in enumerate(zip(plan.pieces, regions, strict=True))
        ]
        joined = self.graph.op("Concat", products, f"{output}.product" if bias else output, axis=-1)
        return self.graph.op("Add", [joined, bias], output) if bias else joined

    def lookup(self, role: str, tokens: str, output: str) -> str:
        """Rows of a weight that is one matrix, [1, new, columns]."""
        graph, plan, (regions,) = self.graph, self.plans[role], self._regions(role)
        form, (rows, columns) = plan.format, plan.shape
        if form.is_float:
            return graph.op("Gather", [regions.values.name, tokens], output)
        # GatherBlockQuantized wants rows of bytes, MatMulNBits of the tied head rows of blocks: the same bytes.
        table = graph.alias(regions.values, f"{role}.rows", (rows, columns * form.bits // 8), TensorProto.UINT8)
        found = graph.op(
            "GatherBlockQuantized", [table, tokens, *_scales(regions)], f"{output}.values" if form.offset else output,
            domain=MICROSOFT, bits=form.bits, block_size=form.block_size, quantize_axis=1, gather_axis=0,
        )  # fmt: skip
        if not regions.offsets:
            return found
        blocks = regions.offsets.shape[1]
        column = graph.alias(regions.offsets, f"{role}.offset_rows", (rows, blocks, 1), TensorProto.FLOAT)
        moved = graph.op(
            "Add", [self._in_blocks(found, form.block_size), graph.op("Gather", [column, tokens], f"{output}.offsets")],
            f"{output}.moved",
        )  # fmt: skip
        return graph.op("Reshape", [moved, graph.shared_constant("flat_shape", np.array([0, 0, -1], np.int64))], output)

    def _matrix(self, plan: WeightPlan, regions: WeightRegions, value: str, bias: str, output: str) -> str:
        form, graph = plan.format, self.graph
        if form.is_float:
            product = f"{output}.product" if bias else output
            # Rows of a checkpoint are outputs: multiplied transposed, they are written as they are read.
            graph.op("FusedMatMul", [value, regions.values.name], product, domain=MICROSOFT, transB=1)
            return graph.op("Add", [product, bias], output) if bias else output
        rows, columns = plan.shape
        inputs = [value, regions.values.name, *_scales(regions)]
        if bias:
            inputs += [""] * (5 - len(inputs)) + [bias]
        product = graph.op(
            "MatMulNBits", inputs, f"{output}.values" if regions.offsets else output, domain=MICROSOFT,
            K=columns, N=rows, bits=form.bits, block_size=form.block_size, accuracy_level=self.accuracy_level,
        )  # fmt: skip
        if not regions.offsets:
            return product
        inputs = [self._block_sums(value, form.block_size), regions.offsets.name]
        offset = graph.op("FusedMatMul", inputs, f"{output}.offset", domain=MICROSOFT, transB=1)
        return graph.op("Add", [product, offset], output)

    def _block_sums(self, value: str, size: int) -> str:
        """Sums of each `size` columns, [1, new, blocks]; computed once for all weights that the value is multiplied with."""
        if (value, size) not in self._sums:
            axis = self.graph.shared_constant("block_axis", np.array([-1], np.int64))
            self._sums[value, size] = self.graph.op(
                "ReduceSum", [self._in_blocks(value, size), axis], f"{value}.sums_of_{size}", keepdims=0
            )
        return self._sums[value, size]

    def _in_blocks(self, value: str, size: int) -> str:
        shape = self.graph.shared_constant(f"blocks_of_{size}", np.array([0, 0, -1, size], np.int64))
        return self.graph.op("Reshape", [value, shape], f"{value}.blocks_of_{size}")

    def _regions(self, role: str) -> tuple[WeightRegions, ...]:
        if role not in self.regions:
            plan = self.plans[role]
            names = [f"{role}.{index}" for index in range(len(plan.pieces))] or [role]
            self.regions[role] = tuple(map(self._reserve, names, plan.matrices))
        return self.regions[role]

    def _reserve(self, name: str, plan: WeightPlan) -> WeightRegions:
        form, graph = plan.format, self.graph
        if form.is_float:
            return WeightRegions(graph.reserve(f"{name}.weight", plan.shape, self.float_type))
        rows, columns = plan.shape
        blocks = -(-columns // form.block_size)
        packed = (rows, blocks, form.block_size * form.bits // 8)
        zero_points = (rows, -(-blocks * form.bits // 8))
        return WeightRegions(
            graph.reserve(f"{name}.weight", packed, TensorProto.UINT8),
            graph.reserve(f"{name}.scales", (rows, blocks), TensorProto.FLOAT),
            None if form.symmetric else graph.reserve(f"{name}.zero_points", zero_points, TensorProto.UINT8),
            graph.reserve(f"{name}.offsets", (rows, blocks), TensorProto.FLOAT) if form.offset else None,
        )


def _scales(regions: WeightRegions) -> list[str]:
    return [region.name for region in (regions.scales, regions.zero_points) if region]
