"""The functions of an .mlpackage, read from its protobuf message; constants are decoded once, whatever shares them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from edgekit.errors import BundleError

from .mil_constants import DECODERS
from .mil_package import BROKEN, Package, model_messages, unpack
from .mil_types import BITS, HELD, ArrayLike, TensorType

__all__ = ["Constant", "Function", "Operation", "Signature", "operator_kinds", "read_functions", "read_signatures"]

LARGEST_TENSOR = 1 << 31  # elements: more than the largest embedding that there is


Constant = ArrayLike | str  # a str is the name of a mode or a type
Outputs = tuple[tuple[str, TensorType], ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator.

    Attributes:
        kind: MIL's name of it.
        inputs: Names of values by parameter; more than one where it takes a list.
        outputs: Name and type of each result.
    """

    kind: str
    name: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: Outputs

    def names(self) -> Iterator[str]:
        """The values that it reads."""
        for names in self.inputs.values():
            yield from names


@dataclass(frozen=True, slots=True)
class Signature:
    """What a function takes and returns.

    Attributes:
        inputs, states, outputs: Types by name; states are kept from call to call.
    """

    inputs: Mapping[str, TensorType]
    states: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]


@dataclass(frozen=True, slots=True)
class Function:
    """One of a package's functions.

    Attributes:
        operations: In an order in which they can be computed; without constants.
        constants: By name, decoded.
    """

    name: str
    signature: Signature
    operations: tuple[Operation, ...]
    constants: Mapping[str, Constant]


def read_signatures(package: Package) -> dict[str, Signature]:
    """What the functions of a package take and return; no constant is read.

    Raises:
        BundleError: The model is no ML program, or is damaged.
    """
    return {name: _FunctionReader(name).signature(spec) for name, spec in _functions(package).items()}


def read_functions(package: Package) -> dict[str, Function]:
    """All functions of a package.

    Raises:
        BundleError: The model is no ML program, is damaged, or a constant of it can't be decoded.
    """
    pool = _ConstantPool(package)
    return {name: _FunctionReader(name).read(spec, pool) for name, spec in _functions(package).items()}


def operator_kinds(package: Package) -> set[str]:
    """Names of all operators that the functions use; those of nested blocks are left out.

    Raises:
        BundleError: The model is no ML program.
    """
    blocks = (block for spec in _functions(package).values() for block in spec.block_specializations.values())
    return {operation.type for block in blocks for operation in block.operations}


def _functions(package: Package) -> Mapping[str, Any]:
    if package.model.WhichOneof("Type") != "mlProgram":
        raise BundleError("the Core ML model is not an ML program", hint=BROKEN)
    functions: Mapping[str, Any] = package.model.mlProgram.functions
    return functions


class _ConstantPool:
    """Constants by the bytes that describe them: functions name the same blobs."""

    def __init__(self, package: Package) -> None:
        self._package = package
        self._decoded: dict[bytes, Constant] = {}

    def value(self, spec: Any) -> tuple[bytes, Constant]:
        """A constant and its key."""
        key: bytes = spec.SerializeToString(deterministic=True)
        if key not in self._decoded:
            self._decoded[key] = self._read(spec)
        return key, self._decoded[key]

    def expression(self, kind: str, inputs: Mapping[str, tuple[bytes, Constant]], type_: TensorType) -> Any:
        """What a `constexpr_` operator decodes, and its key."""
        keys = ((name, key) for name, (key, _) in sorted(inputs.items()))
        key = repr((kind, *keys)).encode()
        if key not in self._decoded:
            values = {name: value for name, (_, value) in inputs.items() if not isinstance(value, str)}
            self._decoded[key] = DECODERS[kind](values, type_)
        return key, self._decoded[key]

    def _read(self, spec: Any) -> Constant:
        kind = _tensor_type(spec.type)
        if spec.WhichOneof("value") == "blobFileValue":
            return self._package.read_blob(spec.blobFileValue.fileName, spec.blobFileValue.offset, kind)
        tensor = spec.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field is None:
            raise ValueError("a constant without a value")
        values = getattr(tensor, field).values
        if kind.dtype == "string":
            return str(values[0])
        if field == "bytes":
            return unpack(np.frombuffer(values, np.uint8), kind)
        return np.array(values).astype(HELD[kind.dtype]).reshape(kind.shape)


class _FunctionReader:
    """Reads one function; what it says is checked as it is read."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._constants: dict[str, tuple[bytes, Constant]] = {}
        self._known: set[str] = set()

    def signature(self, spec: Any) -> Signature:
        inputs, states, outputs = dict[str, TensorType](), dict[str, TensorType](), dict[str, TensorType]()
        with self._reading("its inputs"):
            for value in spec.inputs:
                if value.type.WhichOneof("type") == "stateType":
                    states[value.name] = _tensor_type(value.type.stateType.wrappedType)
                else:
                    inputs[value.name] = _tensor_type(value.type)
        block = self._block(spec)
        with self._reading("its outputs"):
            computed = {value.name: value.type for each in block.operations for value in each.outputs}
            for name in block.outputs:
                outputs[name] = inputs[name] if name in inputs else _tensor_type(computed[name])
        return Signature(inputs, states, outputs)

    def read(self, spec: Any, pool: _ConstantPool) -> Function:
        signature = self.signature(spec)
        with self._reading("its inputs"):
            for value in spec.inputs:
                self._define(value.name)
        read = (self._operation(each, pool) for each in self._block(spec).operations)
        operations = tuple(each for each in read if each is not None)
        constants = {name: value for name, (_, value) in self._constants.items()}
        return Function(self._name, signature, operations, constants)

    def _block(self, spec: Any) -> Any:
        with self._reading("its block"):
            if spec.opset not in spec.block_specializations:  # asking for it would add it
                raise ValueError(f"there is none for opset {spec.opset[:40]!r}")
            return spec.block_specializations[spec.opset]

    def _operation(self, spec: Any, pool: _ConstantPool) -> Operation | None:
        """An operator, or None where it is a constant, which is decoded."""
        kind, name = spec.type, _name_of(spec)
        with self._reading(f"the operator {name} ({kind[:40]})"):
            outputs = tuple((value.name, _tensor_type(value.type)) for value in spec.outputs)
            if kind == "const":
                self._keep(outputs, *pool.value(spec.attributes["val"]))
                return None
            if kind in DECODERS:
                inputs = {key: self._constant(argument, pool) for key, argument in spec.inputs.items()}
                inputs |= {key: pool.value(value) for key, value in spec.attributes.items() if key != "name"}
                self._keep(outputs, *pool.expression(kind, inputs, outputs[0][1]))
                return None
            arguments = {
                key: tuple(self._operand(each, pool) for each in argument.arguments)
                for key, argument in spec.inputs.items()
            }
            if not all(arguments.values()):
                raise ValueError("an argument has no value")
            operation = Operation(kind, name, arguments, outputs)
            self._require(operation.names())
            for output, _ in outputs:
                self._define(output)
            return operation

    def _keep(self, outputs: Outputs, key: bytes, value: Constant) -> None:
        ((name, kind),) = outputs
        if not isinstance(value, str) and not (value.dtype == HELD.get(kind.dtype) and value.shape == kind.shape):
            raise ValueError(f"it is {value.dtype} {value.shape}, not {kind}")
        self._define(name)
        self._constants[name] = key, value

    def _constant(self, argument: Any, pool: _ConstantPool) -> tuple[bytes, Constant]:
        (binding,) = argument.arguments
        if binding.WhichOneof("binding") == "value":
            return pool.value(binding.value)
        if binding.name not in self._constants:
            raise ValueError(f"{binding.name!r} is no constant")
        return self._constants[binding.name]

    def _operand(self, binding: Any, pool: _ConstantPool) -> str:
        """The name of an argument; a constant that has none is given one."""
        if binding.WhichOneof("binding") == "name":
            return str(binding.name)
        name = f"#{len(self._constants)}"
        self._define(name)
        self._constants[name] = pool.value(binding.value)
        return name

    def _define(self, name: str) -> None:
        if name in self._known:
            raise ValueError(f"{name!r} is computed twice")
        self._known.add(name)

    def _require(self, names: Iterable[str]) -> None:
        missing = [name for name in names if name not in self._known]
        if missing:
            raise ValueError(f"nothing before it computes {missing[0][:80]!r}")

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, IndexError, TypeError, ArithmeticError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            raise BundleError(
                f"function {self._name[:40]} of the package: {what[:120]}: {reason}", hint=BROKEN
            ) from error


def _name_of(spec: Any) -> str:
    if "name" in spec.attributes:
        values = spec.attributes["name"].immediateValue.tensor.strings.values
        return str(values[0]) if values else ""
    return str(spec.outputs[0].name) if spec.outputs else ""


def _tensor_type(spec: Any) -> TensorType:
    """The type that a message describes.

    Raises:
        ValueError: It is no tensor, of elements that the evaluator does not have, or too large.
    """
    if spec.WhichOneof("type") != "tensorType":
        raise ValueError(f"it is a {spec.WhichOneof('type')}, not a tensor")
    tensor = spec.tensorType
    dtype = _type_names()[tensor.dataType].lower()
    if dtype not in BITS and dtype != "string":
        raise ValueError(f"it is of {dtype}")
    lengths = (each.constant.size if each.WhichOneof("dimension") == "constant" else -1 for each in tensor.dimensions)
    kind = TensorType(dtype, tuple(lengths))
    if abs(kind.count) > LARGEST_TENSOR:
        raise ValueError(f"it has {abs(kind.count):,} elements")
    return kind


@cache
def _type_names() -> dict[int, str]:
    return {number: name for name, number in model_messages().MIL_pb2.DataType.items()}
