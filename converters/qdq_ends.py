"""The ends of the decoder, for the CPU: tokens to what the NPU takes, and what it gives to logits.

The first graph looks up the embedding and makes from the positions all that depends on them: the rotations' cosines and sines
and the attention masks. The second one norms the last residual stream and multiplies it with the head. They share one weight
file, and a tied embedding in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from edgekit.config import ModelConfig
from edgekit.plan import WeightPlan

from .layer_weights import ResidualBasis
from .onnx_decoder import FIRST_POSITION, INPUTS, ROPE_LENGTH, DecoderEmitter, EmittedDecoder
from .onnx_graph import GraphBuilder
from .qdq_graph import Encoding
from .qdq_layers import HIDDEN, RESIDUAL_RANGE, cosine_name, distinct_ropes, mask_name, rotation_range, sine_name
from .rope import rope_tables

__all__ = ["PAST_LENGTH", "RESIDUAL", "emit_ends"]

PAST_LENGTH = "past_length"
RESIDUAL = "residual"  # the last one: the layers' output


@dataclass(frozen=True, slots=True)
class EmittedEnds:
    """Both graphs; `weights` are all the regions of their common file."""

    first: GraphBuilder
    last: GraphBuilder
    weights: EmittedDecoder


def emit_ends(
    config: ModelConfig,
    weights: Mapping[str, WeightPlan],
    encodings: Mapping[str, Encoding],
    basis: ResidualBasis | None,
    *,
    context: int,
    chunk: int,
    accuracy_level: int,
    data_file: str,
) -> EmittedEnds:
    """Emit what comes before and after the layers.

    Args:
        encodings: Those of the graphs between, by range.
        basis: That of the residual stream between; None for the model's own.
        context: Tokens that the cache holds.
        chunk: Most tokens that are taken at a time.
        accuracy_level: Of MatMulNBits.
    """

    def emitter() -> DecoderEmitter:
        return DecoderEmitter(config, weights, context, 32, accuracy_level, data_file)

    first = emitter()
    first.graph.input(INPUTS["tokens"], TensorProto.INT64, [1, "new"])
    hidden = first.graph.op("Reshape", [first.embed(), _hidden_shape(first)], "embedded_rows")
    if basis:
        hidden = _enter(first.graph, hidden, basis)
    _FirstEnd(config, first.graph, encodings, context, chunk).emit(hidden)
    last = emitter()
    # The same file: what is in it already keeps its place, and the head's arrays come behind it.
    last.graph.data_bytes = first.graph.data_bytes
    if config.tied_embeddings:
        last.share("embedding", first.emitted.weights["embedding"])
    _emit_last(last, encodings[RESIDUAL_RANGE.format(len(config.layers) - 1)], basis)
    weights_of_both = first.emitted.weights | last.emitted.weights
    return EmittedEnds(first.graph, last.graph, EmittedDecoder(last.graph, weights_of_both))


def _emit_last(emitter: DecoderEmitter, encoding: Encoding, basis: ResidualBasis | None) -> None:
    graph, config = emitter.graph, emitter.config
    graph.input(RESIDUAL, TensorProto.UINT16, ["new", config.hidden_size])
    graph.input(INPUTS["logits_start"], TensorProto.INT64, [1])
    for name, value in (("last_axis_end", np.iinfo(np.int64).max), ("axis_0", 0)):
        graph.constant(name, np.array([value], np.int64))
    rows = graph.op("Slice", [RESIDUAL, INPUTS["logits_start"], "last_axis_end", "axis_0"], "last_rows")
    scale = graph.constant("residual.scale", np.array(encoding.scale, np.float32))
    zero = graph.constant("residual.zero_point", np.array(encoding.zero_point, encoding.dtype))
    hidden = graph.op("DequantizeLinear", [rows, scale, zero], "last_hidden")
    if basis:
        hidden = _leave(graph, hidden, basis)
    hidden = graph.op("Unsqueeze", [hidden, "axis_0"], "hidden")
    emitter.logits(emitter.norm(hidden, "final_norm"))


def _hidden_shape(emitter: DecoderEmitter) -> str:
    return emitter.graph.constant("hidden_shape", np.array([-1, emitter.config.hidden_size], np.int64))


def _enter(graph: GraphBuilder, rows: str, basis: ResidualBasis) -> str:
    """Rows [.., hidden] in the basis; see `ResidualBasis.enter`."""
    signed = graph.op("Mul", [rows, graph.constant("signs", basis.signs)], f"{rows}.signed")
    return _turned(graph, signed, basis.butterfly, basis.waves)


def _leave(graph: GraphBuilder, rows: str, basis: ResidualBasis) -> str:
    turned = _turned(graph, rows, basis.butterfly.T, basis.waves.T)
    return graph.op("Mul", [turned, graph.constant("signs", basis.signs)], f"{rows}.signed")


def _turned(graph: GraphBuilder, rows: str, left: NDArray[np.float32], right: NDArray[np.float32]) -> str:
    sizes = {"blocks": [-1, len(left), len(right)], "rows": [-1, len(left) * len(right)]}
    shapes = {name: graph.constant(f"shape_of_{name}", np.array(size, np.int64)) for name, size in sizes.items()}
    blocks = graph.op("Reshape", [rows, shapes["blocks"]], f"{rows}.blocks")
    mixed = graph.op("MatMul", [graph.constant("butterfly", np.ascontiguousarray(left)), blocks], f"{rows}.mixed")
    waved = graph.op("MatMul", [mixed, graph.constant("waves", np.ascontiguousarray(right))], f"{rows}.waved")
    return graph.op("Reshape", [waved, shapes["rows"]], f"{rows}.turned")


class _FirstEnd:
    """The graph before the layers."""

    def __init__(
        self, config: ModelConfig, graph: GraphBuilder, encodings: Mapping[str, Encoding], context: int, chunk: int
    ) -> None:
        self.config, self.graph, self.encodings, self.context = config, graph, encodings, context
        # What fills up a chunk lies past the last position.
        self.positions = (config.positions(context) or context) + chunk

    def emit(self, hidden: str) -> None:
        self._quantize(hidden, HIDDEN, self.encodings[HIDDEN])
        self.graph.output(HIDDEN, TensorProto.UINT16, ["new", self.config.hidden_size])
        self._place()
        self._rotations()
        for window in sorted({layer.window for layer in self.config.layers}):
            self._mask(window)

    def _place(self) -> None:
        """`indices`, the new tokens' places behind those in the cache, int64 [new, 1], and what their positions are."""
        graph = self.graph
        graph.input(PAST_LENGTH, TensorProto.INT64, [])
        count = graph.op("Size", [INPUTS["tokens"]], "new_tokens")
        end = graph.op("Add", [PAST_LENGTH, count], "end")
        one = graph.constant("one", np.array(1, np.int64))
        row = graph.op("Range", [PAST_LENGTH, end, one], "row")
        graph.op("Unsqueeze", [row, graph.constant("axis_1", np.array([1], np.int64))], "indices")
        positions = row
        if self.config.positions(self.context):
            positions = graph.op("Add", [row, graph.input(FIRST_POSITION, TensorProto.INT64, [])], "positions")
        if self.config.longrope_switch:
            graph.input(ROPE_LENGTH, TensorProto.INT64, [])
            switch = graph.constant("rope_switch", np.array(self.config.longrope_switch, np.int64))
            graph.op("Greater", [ROPE_LENGTH, switch], "is_long")
        self.rows = positions

    def _rotations(self) -> None:
        graph = self.graph
        for number, rope in enumerate(distinct_ropes(self.config)):
            encoding, rows = self.encodings[rotation_range(number)], self.rows
            if rope.long_factors:
                long, short = (
                    graph.shared_constant(f"rope_rows.{n}", np.array(n, np.int64)) for n in (self.positions, 0)
                )
                start = graph.op("Where", ["is_long", long, short], f"first_row.{number}")
                rows = graph.op("Add", [rows, start], f"rows.{number}")
            for name, table in zip(
                (cosine_name(number), sine_name(number)), rope_tables(rope, self.positions), strict=True
            ):
                numbers = graph.constant(f"{name}.table", encoding.encode(table[:, None]))
                graph.op("Gather", [numbers, rows], name)
                graph.output(name, TensorProto.UINT16, ["new", 1, rope.dim // 2])

    def _mask(self, window: int) -> None:
        """1 where a new token sees a place, 0 where it does not: cached places that are filled, new ones up to its own."""
        graph, name = self.graph, mask_name(window)
        cached = graph.shared_constant("cached_places", np.arange(self.context, dtype=np.int64))
        filled = graph.op("Less", [cached, PAST_LENGTH], f"{name}.filled")
        places = graph.op("Concat", [cached, "row"], f"{name}.places", axis=0)
        behind = graph.op("Sub", ["indices", places], f"{name}.behind")
        seen = graph.op(
            "GreaterOrEqual", [behind, graph.shared_constant("zero", np.array(0, np.int64))], f"{name}.past"
        )
        news = graph.op("Equal", ["row", "row"], f"{name}.new")
        there = graph.op("Concat", [filled, news], f"{name}.there", axis=0)
        seen = graph.op("And", [seen, there], f"{name}.seen")
        if window:
            width = graph.constant(f"{name}.window", np.array(window, np.int64))
            near = graph.op("Less", [behind, width], f"{name}.near")
            seen = graph.op("And", [seen, near], f"{name}.seen_near")
        # The lowest number of the mask's encoding hides, the highest one is zero.
        numbers = graph.op("Cast", [seen], f"{name}.numbers", to=TensorProto.INT32)
        top = graph.shared_constant("mask_top", np.array(2**16 - 1, np.int32))
        graph.op("Cast", [graph.op("Mul", [numbers, top], f"{name}.wide")], name, to=TensorProto.UINT16)
        graph.output(name, TensorProto.UINT16, ["new", "places"])

    def _quantize(self, value: str, output: str, encoding: Encoding) -> None:
        scale = self.graph.constant(f"{output}.scale", np.array(encoding.scale, np.float32))
        zero = self.graph.constant(f"{output}.zero_point", np.array(encoding.zero_point, encoding.dtype))
        self.graph.op("QuantizeLinear", [value, scale, zero], output)
