"""Attention with a cache, as a part of the PyTorch decoder that each format brings, and the plain one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.config import AttentionConfig, ModelConfig

__all__ = ["CachedAttention", "PlainAttention", "Rotation", "softcapped"]


@dataclass(frozen=True, slots=True)
class Rotation:
    """One kind of rotation at the new tokens' positions.

    Attributes:
        dim: Rotated dimensions of each head, the first ones.
        cosine, sine: [new, head_dim], shaped to multiply heads: the second half of the rotated dimensions has the values of the
            first; of dimensions that are not rotated the cosine is 1 and the sine 0.
        swap: [head_dim, head_dim]: turns a head's rotated halves (a, b) into (-b, a), and what is not rotated into 0.
    """

    dim: int
    cosine: Tensor
    sine: Tensor
    swap: Tensor


class CachedAttention(nn.Module, ABC):
    """Attention over what is cached and what is new, for all layers of a decoder.

    Heads are [1, heads, new, head_dim] where `heads_axis` is 1, [1, new, heads, head_dim] where it is 2. `window` has the
    sliding window of each layer, 0 where it sees all that is cached.
    """

    heads_axis = 1

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__()
        self.config: AttentionConfig = config.attention
        self.context = context
        self.windows = tuple(layer.window if layer.window < context else 0 for layer in config.layers)

    def apart(self, value: Tensor, heads: int) -> Tensor:
        """Heads [1, new, heads * head_dim] that lie side by side, apart."""
        split = value.view(1, -1, heads, self.config.head_dim)
        return split.transpose(1, 2) if self.heads_axis == 1 else split

    def together(self, heads: Tensor) -> Tensor:
        """Undo `apart`."""
        split = heads.transpose(1, 2) if self.heads_axis == 1 else heads
        return split.reshape(1, -1, self.config.heads * self.config.head_dim)

    def positions(self, tokens: Tensor, start: Tensor) -> Tensor:
        """Positions of the new tokens, int64 [new]."""
        return start.reshape(1) + torch.arange(tokens.shape[1], device=tokens.device)

    def rotate(self, heads: Tensor, rotation: Rotation) -> Tensor:
        """Heads at their positions."""
        return heads * rotation.cosine + functional.linear(heads, rotation.swap) * rotation.sine

    @abstractmethod
    def begin(self, start: Tensor, positions: Tensor) -> Any:
        """Called once before the layers of a forward; what it returns, such as masks, is given to each `attend`.

        Args:
            start: int64 [1] or []: tokens that are in the cache.
            positions: int64 [new].
        """

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, place: Any) -> Tensor:
        """Put keys and values into the layer's cache, and attend.

        Args:
            layer: Its number.
            query: Heads, rotated; not yet multiplied with `AttentionConfig.scale`.
            key: Heads, rotated, as many as `kv_heads`.
            value: The same, not rotated.
            place: Of `begin`.

        Returns:
            As many heads as the query has.
        """


class PlainAttention(CachedAttention):
    """In PyTorch's own operators, over the whole context; positions that are not visible are masked. The cache is in buffers."""

    def __init__(self, config: ModelConfig, context: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, context)
        shape = (1, self.config.kv_heads, context, self.config.head_dim)
        for index in range(len(config.layers)):
            self.register_buffer(f"key_{index}", torch.zeros(shape, dtype=dtype), persistent=False)
            self.register_buffer(f"value_{index}", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("places", torch.arange(context), persistent=False)

    def begin(self, start: Tensor, positions: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The positions, and for each kind of window a mask bool [new, context]: what a new token sees."""
        newest, places = positions.unsqueeze(1), self.get_buffer("places").unsqueeze(0)
        visible = places <= newest
        masks = {window: visible & (places > newest - window) if window else visible for window in set(self.windows)}
        return positions, masks

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, place: tuple[Tensor, dict[int, Tensor]]
    ) -> Tensor:
        """See the base."""
        positions, masks = place
        keys = self.get_buffer(f"key_{layer}").index_copy_(2, positions, key)
        values = self.get_buffer(f"value_{layer}").index_copy_(2, positions, value)
        group = self.config.heads // self.config.kv_heads
        grouped = query.reshape(self.config.kv_heads, group, -1, self.config.head_dim)
        scores = grouped @ keys[0].unsqueeze(1).transpose(2, 3) * self.config.scale
        scores = softcapped(scores, self.config.softcap)
        scores = scores.masked_fill(~masks[self.windows[layer]], -torch.inf)
        return (scores.softmax(-1) @ values[0].unsqueeze(1)).reshape(query.shape)


def softcapped(value: Tensor, cap: float) -> Tensor:
    """The value bounded by `cap * tanh(value / cap)`; as it is where the cap is 0."""
    return torch.tanh(value / cap) * cap if cap else value
