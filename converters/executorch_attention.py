"""Attention and positions of ExecuTorch's programs: two operators of its LLM extension keep the cache and attend."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekit.config import ModelConfig, RopeConfig
from edgekit.quiet import quieted

from .rope import inverse_frequencies
from .torch_attention import CachedAttention, Rotation, softcapped

with quieted():  # registers llama::*
    import_module("executorch.extension.llm.custom_ops.custom_ops")

__all__ = ["KEY_CACHE", "VALUE_CACHE", "ComputedPositions", "ExecutorchAttention"]

KEY_CACHE, VALUE_CACHE = "decoder.attention.keys_{}", "decoder.attention.values_{}"
# What a masked score is: less than any other by far, and finite, since attention runs over blocks of keys and a block with
# nothing but infinities has no largest score.
MASKED = -1e9

Floats = NDArray[np.float32]


class ComputedPositions(nn.Module):
    """What the PyTorch decoder's `Positions` looks up, computed: for long contexts its tables take megabytes of the file."""

    def __init__(self, config: ModelConfig, context: int, swaps: nn.Module) -> None:
        """Take the place of a decoder's positions, whose matrices `swap_{}` are `swaps`."""
        super().__init__()
        self.kinds = list(dict.fromkeys(layer.rope for layer in config.layers if layer.rope))
        self.switch = config.longrope_switch if context > config.longrope_switch else 0
        attention = config.attention
        grows = bool(attention.query_growth) and context > attention.query_growth_context
        self.growth = (attention.query_growth, attention.query_growth_context) if grows else None
        for index, rope in enumerate(self.kinds):
            self.register_buffer(f"swap_{index}", swaps.get_buffer(f"swap_{index}"))
            factors = (rope.short_factors, rope.long_factors) if self.switch else (rope.short_factors,)
            turns = [_for_pairs(inverse_frequencies(rope, each), attention.head_dim, 0) for each in factors]
            self.register_buffer(f"frequencies_{index}", torch.stack(turns).to(torch.float64))
            scale = np.full(rope.dim // 2, rope.attention_factor, np.float32)
            self.register_buffer(f"scale_{index}", _for_pairs(scale, attention.head_dim, 1))

    def forward(
        self, positions: Tensor, rope_length: Tensor | None
    ) -> tuple[dict[RopeConfig, Rotation], Tensor | None]:
        """See `Positions`."""
        return {
            rope: self._rotation(index, positions, rope_length) for index, rope in enumerate(self.kinds)
        }, self._growths(positions)

    def _rotation(self, index: int, positions: Tensor, rope_length: Tensor | None) -> Rotation:
        frequencies = self.get_buffer(f"frequencies_{index}")
        if self.switch and rope_length is not None:
            frequencies = frequencies.index_select(0, (rope_length.reshape(1) > self.switch).to(torch.int64))
        # Exact, then rounded once, as float32 would: XNNPACK takes no float64, and would make a piece of this product alone.
        angles = (positions.unsqueeze(1).to(torch.float64) * frequencies).to(torch.float32)
        scale = self.get_buffer(f"scale_{index}")
        cosine, sine = (self._for_heads(part) * scale for part in (torch.cos(angles), torch.sin(angles)))
        return Rotation(self.kinds[index].dim, cosine, sine, self.get_buffer(f"swap_{index}"))

    def _growths(self, positions: Tensor) -> Tensor | None:
        if self.growth is None:
            return None
        rate, context = self.growth
        times = (positions // context).to(torch.float32)
        return self._for_heads((1 + rate * torch.log(1 + times)).unsqueeze(1))

    def _for_heads(self, value: Tensor) -> Tensor:
        return value.unsqueeze(0).unsqueeze(ExecutorchAttention.heads_axis)


def _for_pairs(values: Floats, head_dim: int, unrotated: float) -> Tensor:
    """A value for each rotated pair, [dim / 2], for each dimension of a head."""
    wide = np.full(head_dim, unrotated, np.float32)
    half = len(values)
    wide[:half] = wide[half : 2 * half] = values
    return torch.from_numpy(wide)


class ExecutorchAttention(CachedAttention):
    """The LLM extension's operators: one writes into the cache, one attends, without a copy of keys for each query head.

    Scores that are softly capped are computed in plain operators.
    """

    heads_axis = 2

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__(config, context)
        shape = (1, context, self.config.kv_heads, self.config.head_dim)
        for index in range(len(config.layers)):
            self.register_buffer(f"keys_{index}", torch.zeros(shape), persistent=False)
            self.register_buffer(f"values_{index}", torch.zeros(shape), persistent=False)
        if self.config.softcap or any(self.windows):
            self.register_buffer("places", torch.arange(context), persistent=False)

    def begin(self, start: Tensor, positions: Tensor) -> tuple[int, dict[int, Tensor]]:
        """The cache's length, and for each window a mask float32 [new, context] to add to the scores."""
        first, new = cast("int", start.item()), positions.shape[0]
        for known in (first >= 0, first + new <= self.context):
            torch._check(known)  # type: ignore[no-untyped-call]  # PyTorch has no types for it
        masked = {window for window in self.windows if window or self.config.softcap}
        return first, {
            window: _mask(positions.unsqueeze(1), self.get_buffer("places").unsqueeze(0), window) for window in masked
        }

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, place: tuple[int, dict[int, Tensor]]
    ) -> Tensor:
        """See the base."""
        first, masks = place
        keys, values = self.get_buffer(f"keys_{layer}"), self.get_buffer(f"values_{layer}")
        torch.ops.llama.update_cache(key, keys, first)
        torch.ops.llama.update_cache(value, values, first)
        mask = masks.get(self.windows[layer])
        if self.config.softcap and mask is not None:
            return self._capped(query, keys, values, mask)
        attended: Any = torch.ops.llama.custom_sdpa(
            query, keys, values, first, mask, 0.0, mask is None, self.config.scale
        )
        return cast("Tensor", attended)

    def _capped(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention whose scores are softly capped; heads that share a key are rows of one product."""
        kv_heads, head_dim = self.config.kv_heads, self.config.head_dim
        group = self.config.heads // kv_heads
        grouped = query.view(-1, kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        scores = softcapped(grouped @ keys[0].permute(1, 2, 0) * self.config.scale, self.config.softcap)
        shares = (scores.view(kv_heads, group, -1, self.context) + mask).softmax(-1).view(kv_heads, -1, self.context)
        attended = (shares @ values[0].permute(1, 0, 2)).view(kv_heads, group, -1, head_dim)
        return attended.permute(2, 0, 1, 3).reshape(1, -1, self.config.heads, head_dim)


def _mask(newest: Tensor, places: Tensor, window: int) -> Tensor:
    """What is added to the scores, float32 [new, places]: a token sees itself and what is before it, in its window."""
    visible = places <= newest
    if window:
        visible = visible & (places > newest - window)
    return torch.where(visible, 0.0, MASKED)
