"""From the exported PyTorch decoder to MIL, Core ML's intermediate language: one function of static shapes at a time.

The export is walked node by node with PyTorch's own operators as they are (no decomposition), so that a norm is still a norm
and a product a product. It has a dynamic number of new tokens; here that number is known, and sizes are computed while walking.
coremltools' own front end would take the weights through its passes as floats, and write states only at a program's end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from coremltools.converters.mil.mil import Builder, Var, types
from numpy.typing import NDArray
from torch.fx import Node

from edgekit.errors import ConversionError

from .coreml_attention import StatefulAttentionEmitter
from .coreml_weights import WeightFile

__all__ = ["Lowering", "StoredArray", "StoredProduct"]

aten = torch.ops.aten
LEAST_HALF = 2.0**-24  # float16's least number over zero
Value: TypeAlias = Any  # a MIL variable, a number, a list of such, or one of the two below


@dataclass(frozen=True, slots=True)
class StoredProduct:
    """A matrix in the weight file."""

    key: str


@dataclass(frozen=True, slots=True)
class StoredArray:
    """A tensor of the decoder that is no matrix: a norm's weight, a bias, a table."""

    name: str
    values: NDArray[Any]


class Lowering:
    """Draws the decoder's nodes into the function that is open.

    Args:
        weights: The weight file.
        attention: Draws attention.
    """

    def __init__(self, weights: WeightFile, attention: StatefulAttentionEmitter) -> None:
        self.weights, self.attention = weights, attention
        self.float_type = weights.float_type
        self._drawn: dict[str, Any] = {}
        self._name = ""
        self._named = 0
        self._rules: Mapping[Any, Callable[..., Value]] = {
            aten.sym_size.int: lambda value, axis: self._var(value).shape[axis],
            aten.arange.default: self._arange,
            aten.embedding.default: self._embedding,
            aten.linear.default: self._linear,
            aten.rms_norm.default: self._rms_norm,
            aten.silu.default: lambda value: self._op("silu", x=value),
            aten.gelu.default: self._gelu,
            aten.tanh.default: lambda value: self._op("tanh", x=value),
            aten.add.Tensor: lambda one, other: self._pair("add", one, other),
            aten.sub.Tensor: lambda one, other: self._pair("sub", one, other),
            aten.mul.Tensor: lambda one, other: self._pair("mul", one, other),
            aten.div.Tensor: lambda one, other: self._pair("real_div", one, other),
            aten.gt.Scalar: lambda one, other: self._pair("greater", one, other),
            aten.to.dtype: self._to,
            aten.split.Tensor: lambda value, size, axis=0: self._split(value, size, axis),
            aten.split_with_sizes.default: self._split,
            aten.cat.default: lambda values, axis=0: self._op("concat", values=[*map(self._var, values)], axis=axis),
            aten.index_select.default: self._index_select,
            aten.view.default: self._reshape,
            aten.reshape.default: self._reshape,
            aten.transpose.int: self._transpose,
            aten.unsqueeze.default: lambda value, axis: self._op("expand_dims", x=value, axes=[axis]),
            torch.ops.edgekit_coreml.attend.default: self._attend,
            operator.getitem: lambda values, index: values[index],
            operator.add: operator.add,
            operator.sub: operator.sub,
            operator.mul: operator.mul,
            operator.floordiv: operator.floordiv,
        }  # fmt: skip

    def run(self, nodes: Sequence[Node], inputs: Mapping[str, Value]) -> Any:
        """Draw the nodes; the variable of the decoder's output.

        Args:
            nodes: Of the exported graph.
            inputs: For each placeholder its value.

        Raises:
            ConversionError: The decoder uses an operator that has no rule.
        """
        values: dict[Node, Value] = {}

        def known(argument: Any) -> Any:
            return torch.fx.node.map_arg(argument, lambda node: values[node])

        for node in nodes:
            self._name, self._named = node.name, 0
            if node.op == "placeholder":
                values[node] = inputs.get(node.name)  # an input that the decoder does without is None
            elif node.op == "output":
                return known(node.args[0])[0]
            elif node.target in self._rules:
                values[node] = self._rules[node.target](*known(node.args), **known(node.kwargs))
            elif not _is_check(node):
                raise ConversionError(f"Core ML: no rule for the operator {node.target}, of the decoder's {node.name}")
        raise ConversionError("the exported decoder has no output")

    def _op(self, kind: str, **inputs: Any) -> Any:
        """Draw an operator, named after the node that is walked."""
        name = f"{self._name}_step_{self._named}" if self._named else self._name
        self._named += 1
        return getattr(Builder, kind)(name=name, **inputs)

    def _var(self, value: Value) -> Any:
        """What an operator takes as a tensor."""
        if isinstance(value, StoredArray):
            return self._once(value.name, lambda: self.weights.draw_array(value.name, value.values))
        return value

    def _once(self, name: str, draw: Callable[[], Any]) -> Any:
        """A constant of the function, drawn where it is first used."""
        if name not in self._drawn:
            self._drawn[name] = draw()
        return self._drawn[name]

    def _matrix(self, product: StoredProduct) -> Any:
        return self._once(product.key, lambda: self.weights.draw(product.key))

    def _pair(self, kind: str, one: Value, other: Value) -> Any:
        """An operator of two tensors, or of a tensor and a number."""
        one, other = self._var(one), self._var(other)
        tensor = one if isinstance(one, Var) else other
        number = np.int32 if types.is_int(tensor.dtype) else self.float_type
        one, other = (number(value) if isinstance(value, int | float) else value for value in (one, other))
        return self._op(kind, x=one, y=other)

    def _arange(self, end: int, **_: Any) -> StoredArray:
        return StoredArray(f"numbers_{end}", np.arange(end, dtype=np.int32))

    def _embedding(self, table: StoredProduct | StoredArray, rows: Value, *_: Any) -> Any:
        values = self._matrix(table) if isinstance(table, StoredProduct) else self._var(table)
        return self._op("gather", x=values, indices=rows, axis=0)

    def _linear(self, value: Value, weight: StoredProduct | StoredArray, bias: StoredArray | None = None) -> Any:
        if isinstance(weight, StoredProduct):
            matrix = self._matrix(weight)
            bias = bias or StoredArray(f"zeros_{matrix.shape[0]}", np.zeros(matrix.shape[0], self.float_type))
            return self._op("linear", x=value, weight=matrix, bias=self._var(bias))
        return self._op("matmul", x=value, y=self._var(weight), transpose_y=True)

    def _rms_norm(self, value: Value, shape: Sequence[int], weight: StoredArray, epsilon: float) -> Any:
        """As a layer norm, whose mean is zero over a vector and its negative: squares then can't leave half precision.

        Its epsilon has the vector's precision. One that would round to zero there is the least number over zero: a vector of
        zeros then still gives zeros, and of a larger one (see `coreml_range`) it is less than the vector's own rounding.
        """
        if self.float_type is np.float16:
            epsilon = max(epsilon, LEAST_HALF)
        negative = self._op("mul", x=value, y=self.float_type(-1))
        both = self._op("concat", values=[value, negative], axis=-1)
        name, values = f"{weight.name}.twice", np.concatenate([weight.values, weight.values])
        scale = self._once(name, lambda: self.weights.draw_array(name, values))
        normed = self._op("layer_norm", x=both, axes=[-1], gamma=scale, epsilon=self.float_type(epsilon))
        return self._op("slice_by_size", x=normed, begin=[0] * value.rank, size=value.shape)

    def _gelu(self, value: Value, *, approximate: str = "none") -> Any:
        modes = {"tanh": "TANH_APPROXIMATION", "none": "EXACT"}
        return self._op("gelu", x=value, mode=modes[approximate])

    def _to(self, value: Value, dtype: torch.dtype, *_: Any) -> Any:
        half = "fp16" if self.float_type is np.float16 else "fp32"
        return self._op("cast", x=value, dtype=half if dtype.is_floating_point else "int32")

    def _split(self, value: Value, sizes: int | Sequence[int], axis: int = 0) -> Any:
        length = value.shape[axis]
        if isinstance(sizes, int):
            sizes = [min(sizes, length - first) for first in range(0, length, sizes)]
        self._name += "_part"  # the results get numbers behind it
        return self._op("split", x=value, split_sizes=[*sizes], axis=axis)

    def _index_select(self, value: Value, axis: int, rows: Value) -> Any:
        if isinstance(rows, np.ndarray) and np.array_equal(rows, np.arange(value.shape[axis])):
            return value  # all of them
        return self._op("gather", x=value, indices=rows, axis=axis)

    def _reshape(self, value: Value, shape: Sequence[int]) -> Any:
        return value if tuple(shape) == tuple(value.shape) else self._op("reshape", x=value, shape=[*shape])

    def _transpose(self, value: Value, one: int, other: int) -> Any:
        order = [*range(value.rank)]
        order[one], order[other] = order[other], order[one]
        return self._op("transpose", x=value, perm=order)

    def _attend(self, query: Value, key: Value, value: Value, start: Value, layer: int) -> Any:
        return self.attention.draw(self._name, query, key, value, start, layer)


def _is_check(node: Node) -> bool:
    """True for what only asserts something of sizes."""
    return any(word in str(node.target) for word in ("_assert", "sym_constrain_range"))
