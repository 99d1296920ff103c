"""Making a program bearable for Core AI's reference interpreter, without changing what it computes by more than rounding.

The interpreter takes a hundred times as long for a product in half precision as for one in float32, and unpacks and transposes
every weight in each call. So products are computed in float32 and rounded to half precision after, as devices do that sum in
float32; and what depends on constants alone becomes a function of its own, which is run once.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

import coreai.authoring  # before anything else of the package, which fails without
import numpy as np
from coreai._compiler._mlir_libs._coreaiIR._bindings.compiler import compile_to_binary, serialize_module
from coreai._compiler.dialects import coreai
from coreai._compiler.ir import (
    ArrayAttr,
    DictAttr,
    F16Type,
    FunctionType,
    InsertionPoint,
    Module,
    Operation,
    StringAttr,
    Type,
    TypeAttr,
    Value,
    WalkResult,
)
from coreai.authoring.asset import AIModelAsset

from edgekit.child import answer

from .coreai_names import MAIN, PREPARED

__all__ = ["compile_program"]

_PRODUCTS = {"coreai.batch_matmul", "coreai.decomposable.broadcasting_batch_matmul"}
_OF_CONSTANTS = {"coreai.constant", "coreai.blockwise_shift_scale", "coreai.transpose", "coreai.cast", "coreai.reshape"}
_LEAST_ELEMENTS = 1 << 12
_MOST_BYTES = 4 << 30  # held unpacked; what is beyond is unpacked in each call


def compile_program(asset: str, place: str) -> dict[str, list[str]]:
    """Write what the interpreter executes into a folder.

    Args:
        asset: An .aimodel.
        place: An empty folder, whose name ends in .aimodelx.

    Returns:
        `prepared`: the inputs of the function that are the outputs of `PREPARED`; empty where there is no such function.
    """
    module = AIModelAsset.load(asset).program._module._mlir_module
    with module.context:
        _widen_products(module)
        names = _prepare(module, MAIN)
    compile_to_binary(module=module, output_directory=Path(place), enable_debug_info=False)
    serialize_module(module=module, path=Path(place) / "main-universal.odix")
    return {"prepared": names}


def _widen_products(module: Module) -> None:
    """Compute products of half precision in float32."""
    products: list[Operation] = []

    def visit(operation: Operation) -> WalkResult:
        if operation.name in _PRODUCTS and isinstance(operation.results[0].type.element_type, F16Type):
            products.append(operation)
        return WalkResult.ADVANCE

    module.operation.walk(visit)
    for product in products:
        with InsertionPoint(product), product.location:
            wide = [coreai.cast(operand, np.float32) for operand in product.operands]
            total = coreai.broadcasting_batch_matmul(*wide)
            product.results[0].replace_all_uses_with(coreai.cast(total, np.float16))
        product.operation.erase()


def _prepare(module: Module, function: str) -> list[str]:
    """Move what depends on constants alone out of a function, into `PREPARED`, whose outputs become inputs of the function.

    Returns:
        Their names; empty where there is nothing to move.
    """
    graph = next(graph for graph in module.body.operations if graph.attributes["sym_name"].value == function)
    block = graph.regions[0].blocks[0]
    operations = list(block.operations)
    constant = _depending_on_constants(operations)
    moved = _worth_moving(operations, constant)
    if not moved:
        return []
    names = [f"{PREPARED}_{index}" for index in range(len(moved))]
    with InsertionPoint(graph), graph.location:
        _write_prepared(operations, constant, moved, names)
        for value in moved:
            value.replace_all_uses_with(block.add_argument(value.type, graph.location))
    for operation in reversed([one for one in operations if one.results and one.results[0] in constant]):
        if not any(True for _ in operation.results[0].uses):
            operation.operation.erase()
    _redeclare(graph, [value.type for value in block.arguments], names)
    return names


def _depending_on_constants(operations: Iterable[Operation]) -> set[Value]:
    found: set[Value] = set()
    for operation in operations:
        if operation.name in _OF_CONSTANTS and all(operand in found for operand in operation.operands):
            found.add(operation.results[0])
    return found


def _worth_moving(operations: Iterable[Operation], constant: set[Value]) -> list[Value]:
    """Large values that are computed from constants and used by what is not, in order."""
    used = [operand for one in operations if one.results and one.results[0] not in constant for operand in one.operands]
    moved, room_bytes = [], _MOST_BYTES
    for value in dict.fromkeys(value for value in used if value in constant):
        elements = prod(value.type.shape)
        size_bytes = elements * value.type.element_type.width // 8
        if value.owner.name != "coreai.constant" and elements >= _LEAST_ELEMENTS and size_bytes <= room_bytes:
            moved.append(value)
            room_bytes -= size_bytes
    return moved


def _write_prepared(operations: list[Operation], constant: set[Value], moved: list[Value], names: list[str]) -> None:
    """The function that computes them."""
    needed: set[Value] = set(moved)
    for operation in reversed(operations):
        if operation.results and operation.results[0] in needed:
            needed.update(operation.operands)
    prepared = coreai.GraphOp(PREPARED, [], [value.type for value in moved])
    copies: dict[Value, Value] = {}
    with prepared.block:
        for operation in operations:
            if not operation.results or operation.results[0] not in needed:
                continue
            copy = operation.clone(ip=InsertionPoint.current)
            for index, operand in enumerate(operation.operands):
                copy.operands[index] = copies[operand]
            copies[operation.results[0]] = copy.results[0]
        coreai.output([copies[value] for value in moved])
    prepared.res_attrs = ArrayAttr.get([DictAttr.get({"coreai.name": StringAttr.get(name)}) for name in names])


def _redeclare(graph: Operation, inputs: list[Type], names: list[str]) -> None:
    """Say what the function takes now."""
    results = graph.attributes["function_type"].value.results
    graph.attributes["function_type"] = TypeAttr.get(FunctionType.get(inputs, results))
    added = [DictAttr.get({"coreai.name": StringAttr.get(name)}) for name in names]
    graph.attributes["arg_attrs"] = ArrayAttr.get([*graph.attributes["arg_attrs"], *added])


if __name__ == "__main__":
    answer(compile_program)
