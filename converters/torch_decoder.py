"""The decoder as one PyTorch module, built from its description: what ExecuTorch, Core ML and Core AI export.

It has no control flow that depends on data, and takes static shapes as well as a dynamic number of new tokens. What differs
between formats is theirs to bring: how a product, a norm or a lookup is computed (`DecoderParts`), and attention with its cache
(`CachedAttention`). Nothing here slices inside of a layer, which XNNPACK can't take with dynamic shapes: query, key and value
are products of their own where `DecoderWeights.packed` is false, and rotation is a product with a small constant matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edgekit.config import AttentionConfig, LayerConfig, ModelConfig, RopeConfig

from .rope import rope_tables
from .torch_attention import CachedAttention, Rotation, softcapped
from .torch_weights import DecoderWeights

__all__ = ["TorchDecoder"]


@dataclass(frozen=True, slots=True)
class Shared:
    """What all layers of one forward share.

    Attributes:
        rotations: For each kind of rotation.
        growth: What queries are multiplied with, shaped to multiply heads; None where they do not grow.
        place: What the attention made of the positions; see `CachedAttention.begin`.
    """

    rotations: dict[RopeConfig, Rotation]
    growth: Tensor | None
    place: Any


class TorchDecoder(nn.Module):
    """The decoder of a ModelConfig.

    Attributes:
        last_row: Without `rows`, logits of the last new token only, else of all. Read when the module is exported or run: one
            decoder can be exported both ways.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        attention: CachedAttention,
        *,
        context: int,
        dtype: torch.dtype = torch.float32,
        last_row: bool = True,
    ) -> None:
        """Build it.

        Args:
            config: What to build.
            weights: Its products, norms and lookup.
            attention: Attention and cache.
            context: Tokens that the cache holds, and that positions are made for.
            dtype: Of activations.
            last_row: See the class.
        """
        super().__init__()
        self.config = config
        self.last_row = last_row
        self.embedding = weights.embedding
        self.positions: nn.Module = Positions(config, context, dtype, attention.heads_axis)
        self.attention = attention
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, layer, weights) for index, layer in enumerate(config.layers)
        )
        self.final_norm = weights.norms["final_norm"]
        self.head = weights.head

    def forward(
        self, tokens: Tensor, start: Tensor, rope_length: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Append tokens to the cache.

        Args:
            tokens: int64 [1, new].
            start: int64 [1] or []: tokens that are in the cache.
            rope_length: int64 [1] or []: length that the sequence is known to reach; longer than the model's
                `longrope_switch`, the long rotary factors apply. None: the length with the new tokens.
            rows: int64 [rows]: which new tokens' logits are wanted. None: as `last_row` says.

        Returns:
            Logits [1, rows, vocabulary].
        """
        positions = self.attention.positions(tokens, start)
        rotations, growth = self.positions(positions, rope_length)
        shared = Shared(rotations, growth, self.attention.begin(start, positions))
        hidden = self.embedding(tokens)
        if self.config.embedding_scale != 1:
            hidden = hidden * self.config.embedding_scale
        last = len(self.layers) - 1
        for index, layer in enumerate(cast("Iterable[DecoderLayer]", self.layers)):
            attended = layer.attend(hidden, shared, self.attention)
            if index == last:  # what follows is computed for the wanted rows only
                attended, hidden = self._wanted(attended, rows), self._wanted(hidden, rows)
            hidden = layer(hidden, attended)
        return softcapped(self.head(self.final_norm(hidden)), self.config.logits_softcap)

    def _wanted(self, value: Tensor, rows: Tensor | None) -> Tensor:
        if rows is not None:
            return value.index_select(1, rows)
        return value[:, -1:] if self.last_row else value


class DecoderLayer(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int, layer: LayerConfig, weights: DecoderWeights) -> None:
        super().__init__()
        name = f"layers.{index}."
        self.index, self.rope = index, layer.rope
        self.heads = config.attention.heads, config.attention.kv_heads, config.attention.kv_heads
        self.qkv = weights.linears[name + "qkv"]
        self.output = weights.linears[name + "output"]
        self.gate_up = weights.linears[name + "gate_up"]
        self.down = weights.linears[name + "down"]
        self.activation = weights.activation
        norms = ("attention_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm", "query_norm", "key_norm")
        self.norms = nn.ModuleDict({norm: weights.norms[name + norm] for norm in norms if name + norm in weights.norms})

    def attend(self, hidden: Tensor, shared: Shared, attention: CachedAttention) -> Tensor:
        """The heads' outputs side by side, [1, new, heads * head_dim]."""
        projected = self.qkv(self._normed("attention_norm", hidden))
        query, key, value = (attention.apart(part, heads) for part, heads in zip(projected, self.heads, strict=True))
        query, key = self._normed("query_norm", query), self._normed("key_norm", key)
        if self.rope:
            rotation = shared.rotations[self.rope]
            query, key = attention.rotate(query, rotation), attention.rotate(key, rotation)
        if shared.growth is not None:
            query = query * shared.growth
        return attention.together(attention.attend(self.index, query, key, value, shared.place))

    def forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The residual stream, [1, new, hidden], after the layer."""
        hidden = hidden + self._normed("post_attention_norm", self.output(attended))
        gate, up = self.gate_up(self._normed("mlp_norm", hidden))
        return hidden + self._normed("post_mlp_norm", self.down(self.activation(gate) * up))

    def _normed(self, name: str, value: Tensor) -> Tensor:
        """The value normed, where the model has that norm."""
        return self.norms[name](value) if name in self.norms else value


class Positions(nn.Module):
    """Tables of cosine and sine for each kind of rotation, and of the queries' growth.

    Rotation of a head x (arXiv:2104.09864) is x * cosine + (x times a constant matrix that swaps its halves and turns the sign
    of one) * sine. Dimensions that are not rotated have cosine 1 and sine 0.
    """

    def __init__(self, config: ModelConfig, context: int, dtype: torch.dtype, heads_axis: int) -> None:
        super().__init__()
        self.kinds = list(dict.fromkeys(layer.rope for layer in config.layers if layer.rope))
        self.switch = config.longrope_switch if context > config.longrope_switch else 0
        self.context, self.heads_axis = context, heads_axis
        head_dim = config.attention.head_dim
        for index, rope in enumerate(self.kinds):
            cosine, sine = rope_tables(rope, context)
            if not self.switch:  # the first rows are those of the short factors
                cosine, sine = cosine[:context], sine[:context]
            self._keep(f"cosine_{index}", _widened(cosine, head_dim, 1), dtype)
            self._keep(f"sine_{index}", _widened(sine, head_dim, 0), dtype)
            self._keep(f"swap_{index}", _swap_matrix(rope.dim, head_dim), dtype)
        self.grows = bool(config.attention.query_growth) and context > config.attention.query_growth_context
        if self.grows:
            self._keep("growth", _growth(config.attention, context), dtype)

    def _keep(self, name: str, table: NDArray[np.float32], dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.from_numpy(table).to(dtype), persistent=False)

    def forward(
        self, positions: Tensor, rope_length: Tensor | None
    ) -> tuple[dict[RopeConfig, Rotation], Tensor | None]:
        """Rotations and queries' growth at positions int64 [new]; `rope_length` as the decoder has it."""
        rows = positions
        if self.switch:
            length = positions[-1:] + 1 if rope_length is None else rope_length.reshape(1)
            rows = positions + (length > self.switch).to(torch.int64) * self.context
        rotations = {
            rope: Rotation(
                rope.dim,
                self._taken(f"cosine_{index}", rows),
                self._taken(f"sine_{index}", rows),
                self.get_buffer(f"swap_{index}"),
            )
            for index, rope in enumerate(self.kinds)
        }
        return rotations, self._taken("growth", positions) if self.grows else None

    def _taken(self, table: str, rows: Tensor) -> Tensor:
        """Rows of a table, shaped to multiply heads."""
        return functional.embedding(rows, self.get_buffer(table)).unsqueeze(0).unsqueeze(self.heads_axis)


def _widened(table: NDArray[np.float32], head_dim: int, unrotated: float) -> NDArray[np.float32]:
    """A table of pairs [rows, dim / 2] for whole heads, [rows, head_dim]."""
    wide = np.full((len(table), head_dim), unrotated, np.float32)
    half = table.shape[1]
    wide[:, :half] = wide[:, half : 2 * half] = table
    return wide


def _swap_matrix(dim: int, head_dim: int) -> NDArray[np.float32]:
    """[head_dim, head_dim]: what turns a head's first `dim` values (a, b) into (-b, a), and the others into 0."""
    swap, half = np.zeros((head_dim, head_dim), np.float32), dim // 2
    swap[:half, half:dim] = -np.eye(half, dtype=np.float32)
    swap[half:dim, :half] = np.eye(half, dtype=np.float32)
    return swap


def _growth(attention: AttentionConfig, context: int) -> NDArray[np.float32]:
    """See `AttentionConfig.query_growth`; float32 [context, 1]."""
    times = np.arange(context) // attention.query_growth_context
    # [:, None] would leave a stride of 0, which ExecuTorch refuses
    return (1 + attention.query_growth * np.log1p(times)).astype(np.float32).reshape(-1, 1)
