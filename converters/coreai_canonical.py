"""Saving a Core AI program so that two builds give the same bytes."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path

import numpy as np
from coreai._compiler._mlir_libs._coreaiIR import _bindings
from coreai._compiler.ir import Attribute, DenseResourceElementsAttr, Module, Operation, StringAttr, WalkResult
from coreai.authoring import AIProgram

__all__ = ["save_program"]

_METADATA = "metadata.json"


def save_program(program: AIProgram, asset: Path, description: str) -> tuple[list[str], dict[str, dict[str, int]]]:
    """Write the asset.

    coreai-core stamps the time of the build into the metadata, whose order changes, ends the names of composites in random
    letters, and names large constants by a hash that differs from process to process. Here the time is left out, and both are
    numbered in the order of the program.

    Returns:
        Its files, the program first, and how often each function has each operator.
    """
    module = program._module._mlir_module
    with module.context:
        _number_graphs(module)
        _number_constants(module)
        operators = {
            _name_of(graph): _count(graph) for graph in module.body.operations if "priv" not in graph.attributes
        }
    asset.parent.mkdir(parents=True, exist_ok=True)
    program.save_asset(asset)
    metadata = json.loads((asset / _METADATA).read_text(encoding="utf-8"))
    del metadata["creationDate"]
    text = json.dumps(metadata | {"description": description}, indent=2, sort_keys=True, ensure_ascii=False)
    (asset / _METADATA).write_text(text + "\n", encoding="utf-8", newline="\n")
    files = sorted(path.relative_to(asset).as_posix() for path in asset.rglob("*") if path.is_file())
    return sorted(files, key=lambda name: not name.endswith(".mlirb")), operators


def _number_graphs(module: Module) -> None:
    """Composites by the order that functions call them in."""
    private = {_name_of(graph): graph for graph in module.body.operations if "priv" in graph.attributes}
    functions = [graph for graph in module.body.operations if "priv" not in graph.attributes]
    names: dict[str, str] = {}

    def visit(operation: Operation) -> WalkResult:
        if operation.name == "coreai.invoke":
            called = str(operation.attributes["callee"]).partition("@")[2].partition(">")[0]
            if called not in names:
                names[called] = f"{called.rpartition('_')[0]}_{len(names)}"
            operation.attributes["callee"] = Attribute.parse(f"#param.constant<@{names[called]}> : !param.symbol")
        return WalkResult.ADVANCE

    for function in functions:
        function.operation.walk(visit)
    for old, new in names.items():
        private[old].attributes["sym_name"] = StringAttr.get(new)
        private[old].operation.move_before(functions[0].operation)


def _number_constants(module: Module) -> None:
    named: dict[str, Attribute] = {}

    def visit(operation: Operation) -> WalkResult:
        if operation.name == "coreai.constant":
            value = str(operation.attributes["value"])
            if value.startswith("dense_resource<"):
                if value not in named:
                    named[value] = _named(operation, f"weight_{len(named)}")
                operation.attributes["value"] = named[value]
        return WalkResult.ADVANCE

    module.operation.walk(visit)


def _named(constant: Operation, name: str) -> Attribute:
    """The constant's value under a name of its own."""
    kind = constant.results[0].type
    data = np.empty(-(-prod(kind.shape) * kind.element_type.width // 8), np.uint8)
    _bindings.compiler.copy_constant_value_to_array(constant_op=constant, destination=data)
    return DenseResourceElementsAttr.get_from_buffer(data, name, kind)


def _count(graph: Operation) -> dict[str, int]:
    """How often a function has each operator, constants aside; composites by their names."""
    operators: Counter[str] = Counter()

    def visit(operation: Operation) -> WalkResult:
        if operation.name == "coreai.invoke":
            called = str(operation.attributes["callee"]).partition("@")[2].partition(">")[0]
            operators[called.rpartition("_")[0]] += 1
        elif operation.name not in {"coreai.constant", "coreai.graph", "coreai.output"}:
            operators[operation.name.rpartition(".")[2]] += 1
        return WalkResult.ADVANCE

    graph.operation.walk(visit)
    return dict(sorted(operators.items()))


def _name_of(graph: Operation) -> str:
    name: str = graph.attributes["sym_name"].value
    return name
