"""The PyTorch decoder, exported once, as three MIL functions over one weight file.

`decode` takes one token, `prefill` a chunk of which it gives one row's logits, `score` a chunk of which it gives all. Shapes are
static, as the Neural Engine wants them; a chunk that is not full is padded at its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil import Builder, Function, Program, types
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn import functional

from edgekit.config import ModelConfig
from edgekit.graph import TensorReport

from .coreml_attention import KEYS, VALUES, StatefulAttention, StatefulAttentionEmitter, state_shape
from .coreml_lowering import Lowering, StoredArray, StoredProduct
from .coreml_package import PACKAGE_FILES, WEIGHTS, write_package
from .coreml_range import PRODUCT_DIVISOR, STREAM_DIVISOR, STREAM_READERS, STREAM_WRITERS, lessened
from .coreml_weights import WeightFile
from .stored_weights import StoredMatrix, StoredWeight
from .torch_decoder import TorchDecoder
from .torch_weights import DecoderParts, Floats, load_weights

__all__ = ["PACKAGE_FILES", "PackagedProgram"]

DEFAULT_FUNCTION = "decode"


class PackagedProgram:
    """A Core ML package that is being written.

    Attributes:
        operators: Of each function, how often it has each operator; known once it is written.
        switches: The functions have the input `rope_length`: the rotation depends on how long the sequence gets.
    """

    def __init__(self, package: Path, config: ModelConfig, context: int, chunk: int, *, halves: bool) -> None:
        """Make the folders.

        Args:
            package: Where to write it.
            config: Of the decoder.
            context: Tokens that the states hold.
            chunk: Tokens of `prefill` and `score`.
            halves: Compute in float16, else in float32, which the Neural Engine does not have.
        """
        (package / WEIGHTS).parent.mkdir(parents=True)
        self._lessens = halves and config.norm == "sandwich"
        stream = STREAM_DIVISOR if self._lessens else 1
        self.config = replace(config, embedding_scale=config.embedding_scale / stream)
        self.package, self.context, self.chunk = package, context, chunk
        self.float_type: type[np.floating[Any]] = np.float16 if halves else np.float32
        self.switches = 0 < config.longrope_switch < context
        self.operators: dict[str, dict[str, int]] = {}
        self._weights = WeightFile(package / WEIGHTS, self.float_type)

    def write(self, stored: Iterable[StoredWeight], metadata: Mapping[str, str]) -> tuple[TensorReport, ...]:
        """Write it; how each weight was stored."""
        parts = MilParts(self._weights, lessens=self._lessens)
        if self._lessens:
            stored = lessened(stored, self.config)
        weights = load_weights(stored, self.config, parts)
        attention = StatefulAttention(self.config, self.context)
        decoder = TorchDecoder(self.config, weights, attention, context=self.context)
        exported = self._exported(decoder.eval())
        values = _stored_values(exported, decoder)
        program = Program()
        Builder.name_count.clear()  # names are numbered over all that this process has drawn
        for name, new, chosen in (("decode", 1, False), ("prefill", self.chunk, True), ("score", self.chunk, False)):
            program.add_function(name, self._function(exported, values, new, row_is_chosen=chosen))
        program.default_function_name = DEFAULT_FUNCTION
        program.export_as_multifunction = True
        self._weights.close()
        self.operators = {name: _counted(function) for name, function in program.functions.items()}
        write_package(self.package, program, self._weights, metadata)
        return tuple(parts.reported(weights.reports))

    def _exported(self, decoder: TorchDecoder) -> ExportedProgram:
        example = min(self.chunk, self.context) - 1
        tokens, start, rows = (
            torch.zeros(1, example, dtype=torch.long),
            torch.zeros(1, dtype=torch.long),
            torch.arange(3),
        )
        length = torch.zeros(1, dtype=torch.long) if self.switches else None
        new, wanted = Dim("new", max=self.context), Dim("rows", max=self.context)
        with torch.no_grad():
            return torch.export.export(
                decoder, (tokens, start, length, rows), dynamic_shapes=({1: new}, None, None, {0: wanted})
            )

    def _function(
        self, exported: ExportedProgram, stored: Mapping[str, Any], new: int, *, row_is_chosen: bool
    ) -> Function:
        """Draw one function."""
        specs: dict[str, Any] = {
            "tokens": Builder.placeholder((1, new), types.int32),
            "start": Builder.placeholder((1,), types.int32),
        }
        if self.switches:
            specs["rope_length"] = Builder.placeholder((1,), types.int32)
        if row_is_chosen:
            specs["row"] = Builder.placeholder((1,), types.int32)
        shape = state_shape(self.config, self.context)
        specs |= {name: Builder.state_tensor_placeholder(shape, types.fp16) for name in (KEYS, VALUES)}
        with Function(specs, opset_version=ct.target.iOS18) as function:
            given = dict(function.inputs)
            states = given.pop(KEYS), given.pop(VALUES)
            given["rows"] = given.pop("row", np.arange(new, dtype=np.int32))
            attention = StatefulAttentionEmitter(self.config, self.context, states, self._weights)
            logits = Lowering(self._weights, attention).run(list(exported.graph.nodes), {**stored, **given})
            logits.name = "logits"
            function.set_outputs([logits])
        return function


class MilParts(DecoderParts):
    """Matrices go to the weight file as they come; modules hold tensors of the right shape with no memory behind them.

    Args:
        weights: The weight file.
        lessens: The residual stream, and what is added to it before it is normed, are divided; see `coreml_range`. The
            embedding's part is its scale's.
    """

    def __init__(self, weights: WeightFile, *, lessens: bool) -> None:
        super().__init__()
        self._weights, self._lessens = weights, lessens
        self._reports: dict[str, list[TensorReport]] = {}

    def linear(self, matrix: StoredMatrix, bias: Floats | None) -> nn.Module:
        """See the base."""
        rows, columns = matrix.plan.shape
        product = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        product.weight = self._hollow(matrix)
        if bias is not None:
            product.bias = self._parameter(bias)
        return product

    def embedding(self, matrix: StoredMatrix) -> nn.Module:
        """See the base."""
        rows, columns = matrix.plan.shape
        table = nn.Embedding(rows, columns, device="meta")
        table.weight = self._hollow(matrix)
        return table

    def norm(self, role: str, weight: Floats, eps: float) -> nn.Module:
        """See the base."""
        kind = role.rpartition(".")[2]
        if self._lessens and kind in STREAM_WRITERS:
            weight, eps = weight / np.float32(STREAM_DIVISOR), eps / PRODUCT_DIVISOR**2
        elif self._lessens and kind in STREAM_READERS:
            eps /= STREAM_DIVISOR**2
        return WholeRmsNorm(self._parameter(weight), eps)

    def reported(self, reports: Iterable[TensorReport]) -> Iterator[TensorReport]:
        """The decoder's reports with what was written; vectors are floats of the program's precision."""
        bits = 8 * np.dtype(self._weights.float_type).itemsize
        for report in reports:
            written = self._reports.get(report.role)
            vector = replace(report, bits=bits, size_bytes=report.size_bytes * bits // report.bits)
            yield written.pop(0) if written else vector

    def _hollow(self, matrix: StoredMatrix) -> nn.Parameter:
        key, report = self._weights.add(matrix)
        self._reports.setdefault(matrix.role, []).append(report)
        weight = nn.Parameter(torch.zeros(()).expand(matrix.plan.shape), requires_grad=False)
        weight.stored_key = key  # type: ignore[attr-defined]  # read where the weight is emitted
        return weight


class WholeRmsNorm(nn.Module):
    """An RMS norm as the one operator that the lowering looks for."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, value: Tensor) -> Tensor:
        """Norm the last axis."""
        return functional.rms_norm(value, self.weight.shape, self.weight, self.eps)


def _counted(function: Function) -> dict[str, int]:
    counts = Counter(operation.op_type for operation in function.operations)
    del counts["const"]
    return dict(sorted(counts.items()))


def _stored_values(exported: ExportedProgram, decoder: nn.Module) -> dict[str, StoredProduct | StoredArray]:
    """What each placeholder that is no input of the decoder's stands for."""
    tensors = dict(decoder.named_parameters(remove_duplicate=False)) | dict(
        decoder.named_buffers(remove_duplicate=False)
    )
    values: dict[str, StoredProduct | StoredArray] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind in {InputKind.PARAMETER, InputKind.BUFFER} and spec.target:
            tensor = tensors[spec.target]
            key = getattr(tensor, "stored_key", None)
            values[spec.arg.name] = StoredProduct(key) if key else StoredArray(spec.target, tensor.numpy())
    return values
