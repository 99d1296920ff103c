"""Puts a decoder's whole numbers into its .tflite, in the place of the floats that stood for them.

A tensor of whole numbers has the scale 1, and an operator of its own multiplies what is computed with the scales of the rows:
runtimes before 2.16 read one scale of a tensor, and without a word compute zeros where there are more.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ConversionError

from .litert_weights import Integers, digest

__all__ = ["put_integers"]

_NONE = -1  # an optional input that is not given


def put_integers(path: Path, integers: dict[str, Integers]) -> dict[str, dict[str, int]]:
    """Replace the matrices that are known by their whole numbers, each kept once.

    Args:
        path: The program, which is written again.
        integers: By the digest of the floats in the program.

    Returns:
        The operators of each function.

    Raises:
        ConversionError: A matrix is not in the file as it was given.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(path))
    if integers:
        _Replacement(model, integers).run()
        flatbuffer_utils.write_model(model, str(path))
    names = {each.subgraphIndex: each.signatureKey.decode() for each in model.signatureDefs}
    return {
        names[index]: Counter(flatbuffer_utils.opcode_to_name(model, each.opcodeIndex) for each in subgraph.operators)
        for index, subgraph in enumerate(model.subgraphs)
        if index in names
    }


class _Replacement:
    """Of one model, as `flatbuffer_utils` reads it: lists of tensors, operators and buffers that refer to each other by index."""

    def __init__(self, model: Any, integers: dict[str, Integers]) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self._schema, self._model, self._integers = schema, model, integers
        self._codes = {each.builtinCode: index for index, each in reversed([*enumerate(model.operatorCodes)])}
        self._names = dict[int, str]()  # digests of buffers; empty where they are no matrix
        self._kept = dict[str, int]()  # buffers of whole numbers, by digest
        self._added = dict[bytes, int]()  # buffers of scales

    def run(self) -> None:
        """Replace all."""
        for subgraph in self._model.subgraphs:
            names = [self._name(tensor) for tensor in subgraph.tensors]
            used = [each for operator in subgraph.operators for each in self._replaced(subgraph, operator, names)]
            left = {index for each in used for index in each.inputs if 0 <= index < len(names) and names[index]}
            if any(subgraph.tensors[index].type != self._schema.TensorType.INT8 for index in left):
                raise ConversionError("LiteRT's program uses a matrix otherwise than in products and lookups")
            subgraph.operators = used
        missing = len(self._integers.keys() - self._kept.keys())
        if missing:
            raise ConversionError(
                f"{missing} of {len(self._integers)} matrices are not in LiteRT's program as they were given"
            )
        for buffer in {index for index, name in self._names.items() if name} - set(self._kept.values()):
            self._model.buffers[buffer].data = None  # a second copy
        for name, buffer in self._kept.items():
            self._model.buffers[buffer].data = _bytes(self._integers[name][0])

    def _name(self, tensor: Any) -> str:
        """The digest of a tensor that is one of the matrices; else empty."""
        if tensor.buffer not in self._names:
            data = self._model.buffers[tensor.buffer].data
            name = "" if data is None else digest(np.asarray(data))
            self._names[tensor.buffer] = name if name in self._integers else ""
        return self._names[tensor.buffer]

    def _replaced(self, subgraph: Any, operator: Any, names: list[str]) -> Iterator[Any]:
        """What computes the same with whole numbers: the operator alone, where it has none."""
        operators = self._schema.BuiltinOperator
        product, lookup = self._codes.get(operators.FULLY_CONNECTED), self._codes.get(operators.EMBEDDING_LOOKUP)
        name = names[operator.inputs[1]] if operator.opcodeIndex in {product, lookup} else ""
        if not name:
            yield operator
            return
        self._store(subgraph.tensors[operator.inputs[1]], name)
        result, scales = operator.outputs[0], self._integers[name][1]
        operator.outputs = [self._like(subgraph, result)]
        yield operator
        if operator.opcodeIndex == lookup:
            rows = self._like(subgraph, result, columns=1)
            yield self._lookup(operator, self._constant(subgraph, scales.reshape(-1, 1)), rows)
            yield self._by_elements("MUL", operator.outputs[0], rows, result)
            return
        factors, bias = self._constant(subgraph, scales), (*operator.inputs, _NONE)[2]
        if bias == _NONE:
            yield self._by_elements("MUL", operator.outputs[0], factors, result)
            return
        operator.inputs = [*operator.inputs[:2], _NONE]
        scaled = self._like(subgraph, result)
        yield self._by_elements("MUL", operator.outputs[0], factors, scaled)
        yield self._by_elements("ADD", scaled, bias, result)

    def _store(self, tensor: Any, name: str) -> None:
        """Make a tensor one of 8-bit numbers that stand for themselves."""
        tensor.type, tensor.buffer = self._schema.TensorType.INT8, self._kept.setdefault(name, tensor.buffer)
        tensor.quantization = self._schema.QuantizationParametersT()
        tensor.quantization.scale, tensor.quantization.zeroPoint = np.ones(1, np.float32), np.zeros(1, np.int64)

    def _like(self, subgraph: Any, index: int, *, columns: int = 0) -> int:
        """A tensor like another one, and its number; `columns` replaces its last axis."""
        tensor = copy.copy(subgraph.tensors[index])
        tensor.name = tensor.name + b"/whole"
        if columns:
            tensor.shape = np.array([*tensor.shape[:-1], columns], np.int32)
        subgraph.tensors.append(tensor)
        return len(subgraph.tensors) - 1

    def _constant(self, subgraph: Any, values: NDArray[np.float32]) -> int:
        """A tensor of numbers that the program holds, kept once, and its number."""
        data = values.tobytes()
        if data not in self._added:
            buffer = self._schema.BufferT()
            buffer.data = _bytes(values)
            self._model.buffers.append(buffer)
            self._added[data] = len(self._model.buffers) - 1
        tensor = self._schema.TensorT()
        tensor.name, tensor.type, tensor.buffer = b"scales", self._schema.TensorType.FLOAT32, self._added[data]
        tensor.shape = np.array(values.shape, np.int32)
        subgraph.tensors.append(tensor)
        return len(subgraph.tensors) - 1

    def _lookup(self, operator: Any, table: int, result: int) -> Any:
        other = copy.copy(operator)
        other.inputs, other.outputs = [operator.inputs[0], table], [result]
        return other

    def _by_elements(self, kind: str, first: int, second: int, result: int) -> Any:
        """An operator, MUL or ADD, of two tensors; every program has both, for its norms."""
        operator = self._schema.OperatorT()
        operator.opcodeIndex = self._codes[getattr(self._schema.BuiltinOperator, kind)]
        operator.inputs, operator.outputs = [first, second], [result]
        options = f"{kind.title()}Options"
        operator.builtinOptionsType = getattr(self._schema.BuiltinOptions, options)
        operator.builtinOptions = getattr(self._schema, f"{options}T")()
        return operator


def _bytes(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
