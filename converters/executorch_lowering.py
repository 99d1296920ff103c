"""Lowering an exported decoder to ExecuTorch's file: XNNPACK takes all that it can, in as few pieces as there can be.

The toolchain's own partitioner joins operators pair by pair, which takes minutes for the layers of a real model, and runs each
piece through passes for convolutions and pooling; both are replaced here by what a decoder needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

from edgekit.quiet import quieted

with quieted():
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS, CosConfig, GeluConfig, SinConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.backend.backend_details import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
    from executorch.exir.backend.utils import tag_constant_data
    from executorch.exir.lowered_backend_module import LoweredBackendModule
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

__all__ = ["DELEGATE", "METHOD", "Lowered", "lower"]

DELEGATE = "xnnpack"
METHOD = "forward"
# XNNPACK's sines are made for small angles, and its GELU is the exact one whichever is asked for.
_INEXACT = (CosConfig, SinConfig, GeluConfig)
# Operators that write to what they are given, as functions.
_FUNCTIONALIZED = (auto_functionalized, auto_functionalized_v2)
# Makes the delegate run the pass that linear products need, and no other.
_PRODUCTS_ONLY = CompileSpec("dqlinear_partitioner", b"")


@dataclass(frozen=True, slots=True)
class Lowered:
    """What was written.

    Attributes:
        operators: How often each operator is in the program; those inside of delegates are counted by their own names, and
            each call of a delegate too.
        delegated: Operators by delegate; under the empty name those in none.
    """

    operators: Mapping[str, int]
    delegated: Mapping[str, int]


class GrowingShapes:
    """What a partitioner's configurations differ in here: shapes may depend on how much of the cache is visible."""

    def _check_inputs_are_valid_dtypes(self, node: Node, valid_dtypes: Collection[torch.dtype]) -> bool:
        """Whether all inputs have one type, which XNNPACK takes. The toolchain's refuses such shapes, which may be empty."""
        values = [value.meta.get("val") for value in node.all_input_nodes]
        types = {value.dtype for value in values if isinstance(value, torch.Tensor)}
        return len(types) <= 1 and types <= set(valid_dtypes) and not any(map(_is_number, values))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat))


class StagePartitioner(XnnpackPartitioner):  # type: ignore[misc]  # it has no types
    """Gives XNNPACK one piece between any two operators that it does not take.

    A node's stage counts the pieces that come before it on the way from the inputs: it rises where a value comes back from an
    operator outside. What has the same stage can be one piece, since no way leaves a piece and returns to it.
    """

    def __init__(self) -> None:
        taken = [config for config in ALL_PARTITIONER_CONFIGS if config not in _INEXACT]
        super().__init__([type(config.__name__, (GrowingShapes, config), {}) for config in taken])
        self.delegation_spec = DelegationSpec("XnnpackBackend", [_PRODUCTS_ONLY])

    def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[list[OpOverload], None]:
        """What stays whole. Without a test for each node, the toolchain takes a program apart once and not three times."""
        operators, _ = super().ops_to_not_decompose(ep)
        return operators, None

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag each node that XNNPACK takes with its piece."""
        matched = self.get_matched_nodes_from_configs(exported_program)
        taken = {node for group in matched for node in group if node.op == "call_function"}
        stages = _stages(exported_program, taken)
        computing = {stage for node, stage in stages.items() if "view_copy" not in str(node.target)}
        tags: dict[str, DelegationSpec] = {}
        for node, stage in stages.items():
            if stage in computing:  # a piece that only looks at a value in another shape would be a call for nothing
                tag = node.meta["delegation_tag"] = f"stage{stage}"
                tags[tag] = self.delegation_spec
        tag_constant_data(exported_program)
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)


def _stages(program: ExportedProgram, taken: set[Node]) -> dict[Node, int]:
    """The stage of each node that is taken."""
    inputs = program.graph_signature.user_inputs
    stages: dict[Node, int] = {}
    for node in program.graph.nodes:
        before = [
            stages[value] + (node in taken and value not in taken) for value in node.all_input_nodes if value in stages
        ]
        if before or node.name in inputs:
            stages[node] = max(before, default=0)
    for node in reversed(program.graph.nodes):  # weights on their way into a product have their product's
        if node in taken and node not in stages:
            stages[node] = min(stages[user] for user in node.users)
    return {node: stages[node] for node in program.graph.nodes if node in taken}


def lower(exported: ExportedProgram, constants: Mapping[str, Any], path: Path) -> Lowered:
    """Write the program.

    Args:
        exported: Of the decoder, with dynamic shapes.
        constants: What methods without inputs return, by their names.
        path: The file.
    """
    manager = to_edge_transform_and_lower(
        {METHOD: exported},
        partitioner=[StagePartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=dict(constants),
    )
    lowered = _counted(manager.exported_program(METHOD))
    program = manager.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            do_quant_fusion_and_const_prop=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            emit_mutable_buffer_names=True,  # so that runtimes can read and write the cache
        )
    )
    with path.open("wb") as file:
        program.write_to_file(file)
    return lowered


def _counted(program: ExportedProgram) -> Lowered:
    outside, inside, calls = Counter[str](), Counter[str](), 0
    for node in program.graph.nodes:
        module = getattr(program.graph_module, node.target, None) if node.op == "get_attr" else None
        if isinstance(module, LoweredBackendModule):
            calls += 1
            inside.update(_operators(module.original_module.graph.nodes))
        outside.update(_operators([node]))
    return Lowered(
        dict(sorted((inside + outside + Counter({f"call {DELEGATE}": calls})).items())),
        {DELEGATE: inside.total(), "": outside.total()},
    )


def _operators(nodes: Iterable[Node]) -> Iterator[str]:
    """Names of the operators among nodes; what only asks for sizes or takes results apart is none."""
    for node in nodes:
        mutating = node.target in _FUNCTIONALIZED
        target = node.args[0] if mutating else getattr(node.target, "_op", node.target)
        if isinstance(target, OpOverload) and target.namespace != "prim" and "sym_size" not in target._schema.name:
            yield target._schema.name
