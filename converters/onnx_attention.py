"""Attention and its cache, and what ONNX Runtime's kernel does not do itself.

The CPU kernel takes heads in multiples of 8 and rotates multiples of 16. Other heads are rotated by operators of their own, and
filled up with zeros: zeros add nothing to the scores, and those in the output are cut off. A cache of half-precision numbers
needs half-precision queries, keys and values: those of new tokens are cast, never the cache. One of 8-bit integers has one
scale for each channel, fixed beforehand; the kernel knows none for each token (ONNX Runtime 1.31).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from edgekit.config import AttentionConfig, LayerConfig, ModelConfig
from edgekit.graph import CacheLayout
from edgekit.quant import CacheFormat

from .onnx_graph import MICROSOFT, GraphBuilder, Region

__all__ = ["AttentionHeads", "CachedAttention", "rotation_is_fused"]

ROTATED_MULTIPLE = 16
_CACHE_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8}


def rotation_is_fused(config: ModelConfig) -> bool:
    """True where the attention itself can rotate every layer; its kernel works on vectors of 8 pairs."""
    rotated = {layer.rope.dim for layer in config.layers if layer.rope}
    return not rotated or not any(size % ROTATED_MULTIPLE for size in (config.attention.head_dim, *rotated))


@dataclass(frozen=True, slots=True)
class AttentionHeads:
    """Operators on heads that lie side by side: values are [1, new, heads * size], or [1, new, heads, size] when apart."""

    graph: GraphBuilder
    attention: AttentionConfig

    @property
    def padding(self) -> int:
        """Zeros that each head lacks to the size it is stored in."""
        return self.attention.stored_head_dim - self.attention.head_dim

    def split(self, packed: str, names: Sequence[str]) -> list[str]:
        """Query, key and value out of their common projection."""
        attention = self.attention
        rows = [heads * attention.head_dim for heads in (attention.heads, attention.kv_heads, attention.kv_heads)]
        self.graph.op(
            "Split", [packed, self.graph.shared_constant("qkv_sizes", np.array(rows, np.int64))], names, axis=-1
        )
        return list(names)

    def apart(self, value: str) -> str:
        """Heads apart from each other."""
        return self._apart(value, self.attention.head_dim)

    def flat(self, heads: str, name: str) -> str:
        """Heads side by side again."""
        return self.graph.op("Reshape", [heads, self.graph.shared_constant("flat_shape", np.array([0, 0, -1]))], name)

    def rotated(self, value: str, heads: int, dim: int, rotation: Sequence[str]) -> str:
        """The first `dim` dimensions of each head rotated. `rotation`: tables of cosine and sine, and the rows to take."""
        cosine, sine, rows = rotation
        return self.graph.op(
            "RotaryEmbedding", [value, rows, cosine, sine], f"{value}.rotated", domain=MICROSOFT,
            num_heads=heads, rotary_embedding_dim=dim,
        )  # fmt: skip

    def padded(self, value: str) -> str:
        """Each head filled up with zeros to its stored size."""
        if not self.padding:
            return value
        graph = self.graph
        ends = graph.shared_constant("head_padding", np.array([0] * 7 + [self.padding]))
        filled = graph.op("Pad", [self.apart(value), ends], f"{value}.filled")
        return self.flat(filled, f"{value}.padded")

    def without_padding(self, value: str) -> str:
        """Undo `padded`."""
        if not self.padding:
            return value
        graph, size = self.graph, self.attention.head_dim
        bounds = [
            graph.shared_constant(f"head_{name}", np.array([number]))
            for name, number in (("start", 0), ("end", size), ("axis", 3))
        ]
        heads = self._apart(value, self.attention.stored_head_dim)
        return self.flat(graph.op("Slice", [heads, *bounds], f"{value}.cut"), f"{value}.unpadded")

    def _apart(self, value: str, size: int) -> str:
        shape = self.graph.shared_constant(f"heads_of_{size}", np.array([0, 0, -1, size]))
        return self.graph.op("Reshape", [value, shape], f"{value}.heads")


@dataclass(frozen=True, slots=True)
class CachedAttention:
    """GroupQueryAttention and its cache.

    Attributes:
        layout: Of the cache.
        float_type: ONNX's type of activations.
        lengths: Names of the position of the last token, int32 [1], and the number of tokens, int32 [].
        scales: Where the scales of an 8-bit cache go, key and value of each layer in turn.
    """

    graph: GraphBuilder
    attention: AttentionConfig
    layout: CacheLayout
    float_type: int
    lengths: tuple[str, str]
    scales: list[Region]

    @property
    def attended_type(self) -> int:
        """ONNX's type of query, key and value, and of the rotary tables where the kernel rotates."""
        return self.float_type if self.layout.dtype == CacheFormat.INT8 else _CACHE_TYPES[self.layout.dtype]

    def declare(self, index: int) -> None:
        """Add a layer's cache to the program's inputs and outputs."""
        layout, kind = self.layout, _CACHE_TYPES[self.layout.dtype]
        for past, present in zip(layout.past, layout.present, strict=True):
            self.graph.input(past.format(index), kind, [1, layout.kv_heads, "past", layout.head_dim])
            self.graph.output(present.format(index), kind, [1, layout.kv_heads, "present", layout.head_dim])

    def attend(self, name: str, index: int, layer: LayerConfig, heads: Sequence[str], rotation: Sequence[str]) -> str:
        """The heads' outputs side by side, [1, new, heads * head_dim].

        Args:
            heads: Query, key and value; or all in the first, and twice nothing.
            rotation: Tables of cosine and sine and the rows to take; empty where the heads are rotated, or never are.
        """
        attention, layout = self.attention, self.layout
        inputs = [
            *(self._cast(value, self.attended_type) for value in heads),
            *(past.format(index) for past in layout.past), *self.lengths, *rotation,
        ]  # fmt: skip
        quantized = {}
        if layout.dtype == CacheFormat.INT8:
            inputs += [""] * (12 - len(inputs)) + self._reserve_scales(name)
            quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        while not inputs[-1]:
            inputs.pop()
        outputs = [name + "attended", *(present.format(index) for present in layout.present)]
        attended = self.graph.op(
            "GroupQueryAttention", inputs, outputs, domain=MICROSOFT,
            num_heads=attention.heads, kv_num_heads=attention.kv_heads, scale=attention.scale,
            do_rotary=int(bool(rotation)), local_window_size=layer.window or -1, softcap=attention.softcap, **quantized,
        )  # fmt: skip
        return self._cast(attended, self.float_type, self.attended_type)

    def _cast(self, value: str, wanted: int, given: int | None = None) -> str:
        given = given or self.float_type
        return self.graph.op("Cast", [value], f"{value}.cast", to=wanted) if value and wanted != given else value

    def _reserve_scales(self, name: str) -> list[str]:
        shape = (1, self.layout.kv_heads, 1, self.layout.head_dim)
        regions = [self.graph.reserve(f"{name}{part}_scale", shape, TensorProto.FLOAT) for part in ("key", "value")]
        self.scales.extend(regions)
        return [region.name for region in regions]
