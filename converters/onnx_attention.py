"""What ONNX Runtime's attention does not do itself: its CPU kernel takes heads in multiples of 8 and rotates multiples of 16.

Other heads are rotated by operators of their own, and filled up with zeros: zeros add nothing to the scores, and those in the
output are cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.config import AttentionConfig, ModelConfig

from .onnx_graph import MICROSOFT, GraphBuilder

__all__ = ["AttentionHeads", "rotation_is_fused"]

ROTATED_MULTIPLE = 16


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
