"""Attention over a cache that is given, and the functions of a LiteRT program around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.config import ModelConfig

from .torch_attention import CachedAttention, softcapped
from .torch_decoder import TorchDecoder

__all__ = ["PAST", "PRESENT", "GivenCacheAttention", "LitertFunction"]

PAST, PRESENT = ("past_key_{}", "past_value_{}"), ("present_key_{}", "present_value_{}")
HIDDEN = -1e9  # added to a score that is not seen: far below any other, and finite


class GivenCacheAttention(CachedAttention):
    """Keys and values come in, [kv_heads, context, head_dim], and new ones go out: the programs have no memory of their own.

    Attributes:
        past: Of each layer the key and the value; set before a forward.
        present: What a forward adds, [kv_heads, new, head_dim].
    """

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__(config, context)
        self.register_buffer("places", torch.arange(context, dtype=torch.int32), persistent=False)
        self.past: list[tuple[Tensor, Tensor]] = []
        self.present: list[tuple[Tensor, Tensor]] = []

    def positions(self, tokens: Tensor, start: Tensor) -> Tensor:
        """See the base, in int32; what fills up a chunk may lie beyond the context, for which there are no tables."""
        new = torch.arange(
            tokens.shape[1], dtype=torch.int32
        )  # of int64 the converter traces the whole function once more
        return (start.reshape(1) + new).clamp(max=self.context - 1)

    def begin(self, start: Tensor, positions: Tensor) -> dict[int, Tensor]:
        """For each kind of window what is added to scores, [new, context + new]: the cache's places, then the new tokens."""
        newest = (start.reshape(1).to(torch.int32) + torch.arange(len(positions), dtype=torch.int32)).unsqueeze(1)
        fresh, cached = newest.transpose(0, 1), self.get_buffer("places").unsqueeze(0)
        places = torch.cat([cached, fresh], 1)
        there = torch.cat([cached < start.reshape(1, 1), fresh >= 0], 1)
        seen = there & (places <= newest)
        masks = {window: seen & (places > newest - window) if window else seen for window in set(self.windows)}
        return {window: torch.where(mask, 0.0, HIDDEN) for window, mask in masks.items()}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, place: dict[int, Tensor]) -> Tensor:
        """See the base."""
        keys, values = self.past[layer]
        self.present.append((key[0], value[0]))
        config, new = self.config, query.shape[2]
        grouped = (query * config.scale).reshape(config.kv_heads, -1, config.head_dim)
        scores = torch.cat([grouped @ keys.transpose(1, 2), grouped @ key[0].transpose(1, 2)], -1)
        scores = softcapped(scores, config.softcap).reshape(config.kv_heads, -1, new, self.context + new)
        shares = (scores + place[self.windows[layer]]).softmax(-1).reshape(config.kv_heads, -1, self.context + new)
        mixed = shares[..., : self.context] @ values + shares[..., self.context :] @ value[0]
        return mixed.reshape(query.shape)


class LitertFunction(nn.Module):
    """The decoder with its cache among its inputs and outputs, and logits of all rows or of one."""

    def __init__(self, decoder: TorchDecoder, attention: GivenCacheAttention) -> None:
        super().__init__()
        self.decoder, self.attention = decoder, attention

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Append tokens.

        Args:
            inputs: `tokens` int32 [1, new]; `past_length` int32 [1]; with `logits_start`, int32 [1], logits of that row
                alone; `rope_length` int32 [1] where the program has two kinds of rotation; the cache by the names of `PAST`.

        Returns:
            `logits` float32 [1, rows, vocabulary], and the new keys and values by the names of `PRESENT`.
        """
        layers = range(len(self.decoder.layers))
        self.attention.past = [(inputs[PAST[0].format(layer)], inputs[PAST[1].format(layer)]) for layer in layers]
        self.attention.present = []
        row = inputs.get("logits_start")
        logits = self.decoder(inputs["tokens"], inputs["past_length"], inputs.get("rope_length"), row)
        present, self.attention.present = self.attention.present, []
        named = {
            name.format(layer): each for layer in layers for name, each in zip(PRESENT, present[layer], strict=True)
        }
        return {"logits": logits} | named

    def example(self, new: int, *, one_row: bool, rope_length: bool) -> Mapping[str, Any]:
        """Inputs that the function is exported with."""
        config = self.attention.config
        numbers = ["past_length", *(["logits_start"] if one_row else []), *(["rope_length"] if rope_length else [])]
        shape = (config.kv_heads, self.attention.context, config.head_dim)
        cache = {name.format(layer): torch.zeros(shape) for layer in range(len(self.decoder.layers)) for name in PAST}
        return (
            {"tokens": torch.zeros((1, new), dtype=torch.int32)}
            | {name: torch.zeros(1, dtype=torch.int32) for name in numbers}
            | cache
        )
