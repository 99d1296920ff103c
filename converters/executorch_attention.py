"""Attention and positions of ExecuTorch's programs, in operators that XNNPACK takes; its LLM extension's keeps the cache."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import cast

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
# What a score loses for each token that it is out of sight: no exponential is left of it.
HIDDEN = 1e9
# XNNPACK plans its memory anew where a shape grows, so the places that are read grow by as many at once.
VISIBLE_STEP = 64

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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a forward's tokens are.

    Attributes:
        first: Tokens that are in the cache.
        visible: Places of the cache that are read, those of the new tokens among them.
        masks: For each window, what is added to scores, float32 [group * new, visible].
    """

    first: int
    visible: int
    masks: dict[int, Tensor]


class ExecutorchAttention(CachedAttention):
    """Attention in operators that XNNPACK takes; the LLM extension's writes into the cache.

    Query heads that share a key are rows of one product. The extension's own attention is not used: in the package
    for Python its exponential is a scalar one, and it took half of a prefill (`README.md` in this folder).
    """

    heads_axis = 2

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__(config, context)
        self.group = self.config.heads // self.config.kv_heads
        shape = (self.config.kv_heads, context, 1, self.config.head_dim)
        for index in range(len(config.layers)):
            self.register_buffer(f"keys_{index}", torch.zeros(shape), persistent=False)
            self.register_buffer(f"values_{index}", torch.zeros(shape), persistent=False)
        self.register_buffer("places", torch.arange(context, dtype=torch.float32).unsqueeze(0), persistent=False)

    def begin(self, start: Tensor, positions: Tensor) -> Place:
        """See the base."""
        first, new = cast("int", start.item()), positions.shape[0]
        steps = (start + (new - 1)) // VISIBLE_STEP + 1
        visible = cast("int", torch.clamp(steps * VISIBLE_STEP, max=self.context).item())
        for known in (
            first >= 0,
            first + new <= self.context,
            visible >= min(VISIBLE_STEP, self.context),
            visible <= self.context,
        ):
            torch._check(known)  # type: ignore[no-untyped-call]  # PyTorch has no types for it
        rows = torch.cat([positions.to(torch.float32)] * self.group).unsqueeze(1)
        ago = rows - self.get_buffer("places")[:, :visible]
        return Place(first, visible, {window: _mask(ago, window) for window in set(self.windows)})

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, place: Place) -> Tensor:
        """See the base."""
        keys, values = (self._cached(f"{kind}_{layer}", new, place) for kind, new in (("keys", key), ("values", value)))
        kv_heads, head_dim = self.config.kv_heads, self.config.head_dim
        rows = _permuted(query.view(-1, kv_heads, self.group, head_dim), 1, 2, 0, 3).view(kv_heads, -1, head_dim)
        scores = softcapped(torch.bmm(rows * self.config.scale, keys.transpose(1, 2)), self.config.softcap)
        attended = torch.bmm((scores + place.masks[self.windows[layer]]).softmax(-1), values)
        return _permuted(attended.view(kv_heads, self.group, -1, head_dim), 2, 0, 1, 3)

    def together(self, heads: Tensor) -> Tensor:
        """See the base."""
        return heads.view(1, -1, self.config.heads * self.config.head_dim)

    def _cached(self, name: str, new: Tensor, place: Place) -> Tensor:
        """What is visible of a cache after `new` heads were written to it, [kv_heads, visible, head_dim]."""
        cache = self.get_buffer(name)
        torch.ops.llama.update_cache(_permuted(new, 2, 1, 0, 3), cache, place.first)
        return cache[:, : place.visible].view(self.config.kv_heads, -1, self.config.head_dim)


def _permuted(value: Tensor, *axes: int) -> Tensor:
    """A copy with other axes, which can be viewed with one size left open; XNNPACK takes no sizes that are computed."""
    return cast("Tensor", torch.ops.aten.permute_copy(value, axes))


def _mask(ago: Tensor, window: int) -> Tensor:
    """0 where a token sees a place that is `ago` tokens before it: itself and what is before it, in its window."""
    hidden = ago.clamp(max=0)
    if window:
        hidden = hidden + (window - 1 - ago).clamp(max=0)
    return hidden * HIDDEN
