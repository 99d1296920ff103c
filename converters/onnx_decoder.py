"""The decoder as ONNX operators, emitted from its description.

Fused operators of ONNX Runtime do the work: GroupQueryAttention (rotation, cache and attention in one), MatMulNBits,
GatherBlockQuantized, SkipSimplifiedLayerNormalization. Logits are computed from row `logits_start` on only, and the last layer
computes only those rows: a row of logits for every prompt token would cost a fifth of prefill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from edgekit.config import LayerConfig, ModelConfig, RopeConfig
from edgekit.graph import CacheLayout
from edgekit.plan import WeightPlan
from edgekit.quant import CacheFormat

from .onnx_attention import AttentionHeads, CachedAttention, rotation_is_fused
from .onnx_graph import MICROSOFT, GraphBuilder, Region
from .onnx_weights import StoredWeights, WeightRegions

__all__ = [
    "CHANGE",
    "HIDDEN",
    "INPUTS",
    "OUTPUTS",
    "DecoderEmitter",
    "EmittedDecoder",
    "cache_layout",
    "emit_decoder",
    "emit_layer",
]

INPUTS = {"tokens": "input_ids", "length": "total_length", "logits_start": "logits_start"}
ROPE_LENGTH, FIRST_POSITION = "rope_length", "first_position"
QUERY_GROWTH = "query_growth"
OUTPUTS = {"logits": "logits"}
HIDDEN, CHANGE = "hidden", "{}.change"
_END = np.array([np.iinfo(np.int64).max], np.int64)


@dataclass(slots=True)
class EmittedDecoder:
    """A finished graph and the regions that must be filled.

    `weights` has one for each matrix that a role is kept as; `cache_scales` those of an 8-bit cache, key and value of each layer
    in turn. `factors`: the value that each role's weight is multiplied with.
    """

    builder: GraphBuilder
    weights: dict[str, tuple[WeightRegions, ...]] = field(default_factory=dict)
    tables: dict[RopeConfig, tuple[Region, Region]] = field(default_factory=dict)
    cache_scales: list[Region] = field(default_factory=list)
    factors: dict[str, str] = field(default_factory=dict)


def cache_layout(config: ModelConfig, cache: CacheFormat = CacheFormat.FLOAT32) -> CacheLayout:
    """The key-value cache of an emitted decoder."""
    return CacheLayout(len(config.layers), config.attention.kv_heads, config.attention.stored_head_dim, str(cache))


def emit_decoder(
    config: ModelConfig,
    weights: Mapping[str, WeightPlan],
    *,
    context: int,
    activation_bits: int,
    accuracy_level: int,
    data_file: str,
    cache: CacheFormat = CacheFormat.FLOAT32,
) -> EmittedDecoder:
    """Emit the whole decoder.

    Args:
        config: What to emit.
        weights: How each weight is stored, by role.
        context: Tokens that the cache holds. The rotary tables are made for as many positions, or for all that the model
            was trained for where every layer slides.
        activation_bits: 32, or 16 for half precision.
        accuracy_level: Of MatMulNBits: 4 multiplies in int8, 0 in floats.
        data_file: Name of the weight file, beside the program.
        cache: How keys and values are kept; no wider than the activations.
    """
    return DecoderEmitter(config, weights, context, activation_bits, accuracy_level, data_file, cache).emit()


def emit_layer(
    config: ModelConfig,
    weights: Mapping[str, WeightPlan],
    index: int,
    *,
    context: int,
    data_file: str,
    changes: bool = False,
) -> tuple[EmittedDecoder, str, str]:
    """Emit one layer in full precision, from `HIDDEN` [1, new, hidden] on, with all its matrices' factors as outputs.

    Args:
        changes: Give it an input for each of its matrices, `CHANGE` with the role for `{}`, that is added to its product.

    Returns:
        The layer, the name of the residual stream after it, and that of this stream normed for what follows.
    """
    emitter = DecoderEmitter(config, weights, context, 32, 0, data_file)
    emitter.changes = changes
    return emitter.emit_one(index)


class DecoderEmitter:
    """Draws the decoder, whole or in parts; the arguments are those of `emit_decoder`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, WeightPlan],
        context: int,
        activation_bits: int,
        accuracy_level: int,
        data_file: str,
        cache: CacheFormat = CacheFormat.FLOAT32,
    ) -> None:
        self.config = config
        self.float_type = TensorProto.FLOAT16 if activation_bits == 16 else TensorProto.FLOAT
        self.numpy_type = np.float16 if activation_bits == 16 else np.float32
        self.graph = GraphBuilder(data_file)
        self.emitted = EmittedDecoder(self.graph)
        self.stored = StoredWeights(self.graph, weights, self.float_type, accuracy_level, self.emitted.weights)
        self.slides = config.positions(context) > 0
        self.positions = config.positions(context) or context
        self.heads = AttentionHeads(self.graph, config.attention)
        self.cached = CachedAttention(
            self.graph, config.attention, cache_layout(config, cache), self.float_type,
            ("sequence_lengths", INPUTS["length"]), self.emitted.cache_scales,
        )  # fmt: skip
        self.fused_rotation = rotation_is_fused(config)
        self.grows = bool(config.attention.query_growth) and self.positions > config.attention.query_growth_context
        self.position_ids = ""
        self.changes = False

    def emit(self) -> EmittedDecoder:
        """Draw the whole decoder."""
        self._declare_inputs(range(len(self.config.layers)))
        hidden = self.embed()
        residual, normed = (
            hidden,
            self.norm(hidden, "final_norm" if not self.config.layers else "layers.0.attention_norm"),
        )
        for index, layer in enumerate(self.config.layers):
            residual, normed = self._layer(index, layer, residual, normed)
        self.logits(normed)
        return self.emitted

    def emit_one(self, index: int) -> tuple[EmittedDecoder, str, str]:
        """Draw one layer, from `HIDDEN` on."""
        self._declare_inputs(range(index, index + 1))
        hidden = self.graph.input(HIDDEN, self.float_type, [1, "new", self.config.hidden_size])
        normed = self.norm(hidden, f"layers.{index}.attention_norm")
        residual, normed = self._layer(index, self.config.layers[index], hidden, normed)
        for value in {residual, normed, *self.emitted.factors.values()}:
            self.graph.output(value, self.float_type, [1, "new", f"{value}.columns"])
        return self.emitted, residual, normed

    def _declare_inputs(self, layers: range) -> None:
        graph = self.graph
        graph.input(INPUTS["tokens"], TensorProto.INT64, [1, "new"])
        graph.input(INPUTS["length"], TensorProto.INT32, [])
        graph.input(INPUTS["logits_start"], TensorProto.INT64, [1])
        last = graph.op("Sub", [INPUTS["length"], graph.constant("one", np.array(1, np.int32))], "last_position")
        graph.op("Reshape", [last, graph.constant("shape_1", np.array([1], np.int64))], "sequence_lengths")
        if self.config.longrope_switch or self.grows or self.slides or not self.fused_rotation:
            self._choose_positions()
        for index in layers:
            self.cached.declare(index)
        graph.constant("last_axis_end", _END)
        graph.constant("axis_1", np.array([1], np.int64))

    def _choose_positions(self) -> None:
        """The new tokens' rows in the rotary tables, int64 [1, new], and by how much their queries grow, [1, new, 1].

        With long factors the tables have a second half, for sequences past the original context. Where the cache slides,
        its oldest token is not the sequence's first.
        """
        graph = self.graph
        count = graph.op("Size", [INPUTS["tokens"]], "new_tokens")
        end = graph.op("Cast", [INPUTS["length"]], "length_64", to=TensorProto.INT64)
        if self.slides:
            graph.input(FIRST_POSITION, TensorProto.INT64, [])
            end = graph.op("Add", [end, FIRST_POSITION], "end_position")
        start = graph.op("Sub", [end, count], "start_position")
        rows = graph.op("Range", [start, end, graph.constant("one_64", np.array(1, np.int64))], "positions")
        if self.grows:
            self._grow_queries(rows)
        if self.config.longrope_switch:
            rows = graph.op("Add", [rows, self._first_row()], "rows")
        shape = graph.constant("shape_1_all", np.array([1, -1], np.int64))
        self.position_ids = graph.op("Reshape", [rows, shape], "position_ids")

    def _grow_queries(self, positions: str) -> None:
        graph, attention = self.graph, self.config.attention
        context = graph.constant("query_growth_context", np.array(attention.query_growth_context, np.int64))
        times = graph.op("Cast", [graph.op("Div", [positions, context], "times_over")], "times", to=self.float_type)
        one = self._scalar("one_float", 1.0)
        grown = graph.op("Log", [graph.op("Add", [times, one], "times_more")], "log_times")
        scaled = graph.op("Mul", [grown, self._scalar("query_growth_rate", attention.query_growth)], "grown")
        shape = graph.constant("shape_1_all_1", np.array([1, -1, 1], np.int64))
        graph.op("Reshape", [graph.op("Add", [scaled, one], "growths"), shape], QUERY_GROWTH)

    def _first_row(self) -> str:
        """The row of position 0 in the half of the rotary tables that applies."""
        graph = self.graph
        graph.input(ROPE_LENGTH, TensorProto.INT64, [])
        switch = graph.constant("rope_switch", np.array(self.config.longrope_switch, np.int64))
        short, long = (graph.constant(f"rope_rows.{n}", np.array(n, np.int64)) for n in (0, self.positions))
        return graph.op("Where", [graph.op("Greater", [ROPE_LENGTH, switch], "is_long"), long, short], "first_row")

    def embed(self) -> str:
        """The tokens' rows of the embedding, scaled."""
        embedded = self.stored.lookup("embedding", INPUTS["tokens"], "embedded")
        if self.config.embedding_scale == 1:
            return embedded
        return self.graph.op("Mul", [embedded, self._scalar("embedding_scale", self.config.embedding_scale)], "scaled")

    def _layer(self, index: int, layer: LayerConfig, residual: str, normed: str) -> tuple[str, str]:
        """One layer; its residual stream and the next layer's normed input."""
        name, last = f"layers.{index}.", index == len(self.config.layers) - 1
        attended = self._attention(name, index, layer, normed)
        if last:
            attended, residual = self._last_rows(attended), self._last_rows(residual)
        projected = self._linear(name + "output", attended)
        residual, normed = self._add_and_norm(residual, projected, name + "post_attention_norm", name + "mlp_norm")
        following = "final_norm" if last else f"layers.{index + 1}.attention_norm"
        return self._add_and_norm(residual, self._mlp(name, normed), name + "post_mlp_norm", following)

    def _add_and_norm(self, residual: str, change: str, post_norm: str, next_norm: str) -> tuple[str, str]:
        """residual + change (normed first in a sandwich), and that sum normed for what follows."""
        if self.config.norm == "sandwich":
            change = self.norm(change, post_norm)
        total, normed = f"{change}.sum", f"{change}.normed"
        outputs = [normed, "", "", total]
        inputs = [residual, change, self.stored.vector(next_norm)]
        self.graph.op(
            "SkipSimplifiedLayerNormalization", inputs, outputs, domain=MICROSOFT, epsilon=self.config.norm_eps
        )
        return total, normed

    def _attention(self, name: str, index: int, layer: LayerConfig, normed: str) -> str:
        """The heads' outputs side by side, [1, new, heads * head_dim]."""
        rotation = self._rotation(layer) if self.fused_rotation else []
        heads = self._query_key_value(name, layer, self._linear(name + "qkv", normed))
        attended = self.cached.attend(name, index, layer, heads, rotation)
        return self.heads.without_padding(attended)

    def _rotation(self, layer: LayerConfig) -> list[str]:
        """The layer's cosine and sine tables and the rows to take; empty for a layer without positions."""
        if not layer.rope:
            return []
        cosine, sine = self._rope_tables(layer.rope)
        return [cosine.name, sine.name, self.position_ids]

    def _query_key_value(self, name: str, layer: LayerConfig, packed: str) -> list[str]:
        """The attention's first three inputs: packed in one, or apart where something is done to the heads before.

        The operator has inputs for norms of query and key, but its CPU kernel refuses them (ONNX Runtime 1.31).
        """
        heads, attention = self.heads, self.config.attention
        rotation = [] if self.fused_rotation else self._rotation(layer)
        if not (attention.query_key_norm or rotation or heads.padding or self.grows):
            return [packed, "", ""]
        query, key, value = heads.split(packed, [name + part for part in ("query", "key", "value")])
        if attention.query_key_norm:
            query, key = (
                heads.flat(self.norm(heads.apart(part), name + norm), f"{part}.flat")
                for part, norm in ((query, "query_norm"), (key, "key_norm"))
            )
        if layer.rope and rotation:
            query = heads.rotated(query, attention.heads, layer.rope.dim, rotation)
            key = heads.rotated(key, attention.kv_heads, layer.rope.dim, rotation)
        if self.grows:
            query = self.graph.op("Mul", [query, QUERY_GROWTH], f"{query}.grown")
        return [heads.padded(part) for part in (query, key, value)]

    def _mlp(self, name: str, normed: str) -> str:
        both = self._linear(name + "gate_up", normed)
        gate, up = name + "gate", name + "up"
        self.graph.op("Split", [both], [gate, up], axis=-1, num_outputs=2)
        if self.config.activation == "silu":
            active = self.graph.op("QuickGelu", [gate], name + "active", domain=MICROSOFT, alpha=1.0)
        else:
            active = self.graph.op("FastGelu", [gate], name + "active", domain=MICROSOFT)
        return self._linear(name + "down", self.graph.op("Mul", [active, up], name + "product"))

    def logits(self, normed: str) -> None:
        """The head, from the last normed rows on."""
        softcap = self.config.logits_softcap
        role = "embedding" if self.config.tied_embeddings else "head"
        steps: list[tuple[str, str]] = []
        if softcap:
            steps += [("Div", "softcap"), ("Tanh", ""), ("Mul", "softcap")]
            self._scalar("softcap", softcap)
        half = self.float_type != TensorProto.FLOAT
        value = self._linear(role, normed, output="logits" if not steps and not half else "head")
        for number, (kind, constant) in enumerate(steps):
            output = "logits" if number == len(steps) - 1 and not half else f"head.{number}"
            value = self.graph.op(kind, [value, constant] if constant else [value], output)
        if half:
            self.graph.op("Cast", [value], "logits", to=TensorProto.FLOAT)
        self.graph.output(OUTPUTS["logits"], TensorProto.FLOAT, [1, "rows", self.config.vocab_size])

    def share(self, role: str, matrices: tuple[WeightRegions, ...]) -> None:
        """Use a weight that another graph has put into the same file."""
        types = {1: TensorProto.UINT8, 2: TensorProto.FLOAT16, 4: TensorProto.FLOAT}
        for region in (region for regions in matrices for region in regions.arrays):
            self.graph.alias(region, region.name, region.shape, types[region.item_bytes])
        self.emitted.weights[role] = matrices

    def _last_rows(self, value: str) -> str:
        return self.graph.op("Slice", [value, INPUTS["logits_start"], "last_axis_end", "axis_1"], f"{value}.last_rows")

    def _linear(self, role: str, value: str, *, output: str = "") -> str:
        """value times the role's weight, and its bias where it has one."""
        self.emitted.factors[role] = value
        output = output or role
        if not self.changes:
            return self.stored.product(role, value, output)
        change = CHANGE.format(role)
        self.graph.input(change, self.float_type, [1, f"{change}.rows", f"{change}.columns"])
        return self.graph.op("Add", [self.stored.product(role, value, f"{output}.unchanged"), change], output)

    def norm(self, value: str, role: str) -> str:
        """The value normed with a role's weight."""
        inputs = [value, self.stored.vector(role)]
        return self.graph.op(
            "SimplifiedLayerNormalization", inputs, f"{role}.normed", axis=-1, epsilon=self.config.norm_eps
        )

    def _scalar(self, name: str, value: float) -> str:
        return self.graph.constant(name, np.array(value, self.numpy_type))

    def _rope_tables(self, rope: RopeConfig) -> tuple[Region, Region]:
        tables = self.emitted.tables
        if rope not in tables:
            shape = (self.positions * (2 if rope.long_factors else 1), rope.dim // 2)
            kind = self.cached.attended_type if self.fused_rotation else self.float_type
            cosine, sine = (self.graph.reserve(f"{name}.{len(tables)}", shape, kind) for name in ("cosine", "sine"))
            tables[rope] = cosine, sine
        return tables[rope]
