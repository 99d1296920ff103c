"""Attention with Core ML's stateful cache: one operator in the PyTorch decoder, and what it becomes in MIL.

All layers' keys lie in one state and all values in another, float16 [layers, kv_heads, context, head_dim]: Core ML has states
of float16 alone, and two large ones are what it is known to update in place. Positions in them are absolute, so a sequence is
taken back by calling with a smaller start; what lies behind is masked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from coremltools.converters.mil.mil import Builder
from torch import Tensor

from edgekit.config import ModelConfig

from .coreml_weights import WeightFile
from .torch_attention import CachedAttention

__all__ = ["KEYS", "VALUES", "StatefulAttention", "StatefulAttentionEmitter", "state_shape"]

KEYS, VALUES = "keys", "values"
# What a hidden position's score is lowered by: enough for a weight of zero, small enough for half precision.
HIDDEN = 3e4


@torch.library.custom_op("edgekit_coreml::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, start: Tensor, layer: int) -> Tensor:
    """Never computes: the exporter traces the fake below, and `StatefulAttentionEmitter` draws the operator."""
    raise TypeError("edgekit_coreml::attend stands for what is drawn in MIL")


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, start: Tensor, layer: int) -> Tensor:
    return torch.empty_like(query)


class StatefulAttention(CachedAttention):
    """The operator that `StatefulAttentionEmitter` draws."""

    def begin(self, start: Tensor, positions: Tensor) -> Tensor:
        """The start."""
        return start

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, place: Tensor) -> Tensor:
        """See the base."""
        attended: Tensor = torch.ops.edgekit_coreml.attend(query, key, value, place, layer)
        return attended


def state_shape(config: ModelConfig, context: int) -> tuple[int, int, int, int]:
    """Of the keys' state and of the values'."""
    return len(config.layers), config.attention.kv_heads, context, config.attention.head_dim


class StatefulAttentionEmitter:
    """Draws attention into one function.

    Args:
        config: Of the decoder.
        context: Tokens that the states hold.
        states: The function's state inputs, keys and values.
        weights: The weight file; it says what the function computes in. States are float16 all the same.
    """

    def __init__(self, config: ModelConfig, context: int, states: tuple[Any, Any], weights: WeightFile) -> None:
        self.attention, self.context = config.attention, context
        self.windows = tuple(layer.window if layer.window < context else 0 for layer in config.layers)
        self.states, self.weights, self.float_type = states, weights, weights.float_type
        self._read: list[Any] = [None, None]
        self._masks: dict[int, Any] = {}
        self._places: tuple[Any, Any] = (None, None)

    def draw(self, name: str, query: Any, key: Any, value: Any, start: Any, layer: int) -> Any:
        """The attended heads, [1, heads, new, head_dim], as the query has them.

        Args:
            name: Of the result, and the beginning of all others' names.
            query: [1, heads, new, head_dim].
            key: [1, kv_heads, new, head_dim].
            value: The same.
            start: int32 [1]: tokens in the cache.
            layer: Its number.
        """
        keys = self._append(f"{name}_keys", 0, key, start, layer)
        values = self._append(f"{name}_values", 1, value, start, layer)
        heads, new, size = query.shape[1:]
        kv_heads = self.attention.kv_heads
        scaled = Builder.mul(x=query, y=self.float_type(self.attention.scale), name=f"{name}_scaled")
        # Heads that share keys become rows of one product: the keys are read once, and not copied.
        grouped = Builder.reshape(x=scaled, shape=(1, kv_heads, heads // kv_heads * new, size), name=f"{name}_grouped")
        scores = Builder.matmul(x=grouped, y=keys, transpose_y=True, name=f"{name}_products")
        scores = self._softcapped(name, scores)
        shape = (kv_heads, heads // kv_heads, new, self.context)
        apart = Builder.reshape(x=scores, shape=shape, name=f"{name}_apart")
        masked = Builder.add(x=apart, y=self._mask(start, new, self.windows[layer]), name=f"{name}_masked")
        weights = Builder.softmax(x=masked, axis=-1, name=f"{name}_weights")
        together = Builder.reshape(x=weights, shape=scores.shape, name=f"{name}_together")
        found = Builder.matmul(x=together, y=values, name=f"{name}_found")
        return Builder.reshape(x=found, shape=query.shape, name=name)

    def _append(self, name: str, which: int, rows: Any, start: Any, layer: int) -> Any:
        """Write new rows into a state; the layer's part of it, [1, kv_heads, context, head_dim]."""
        state = self.states[which]
        before = self._read[which] or Builder.read_state(input=state, name=f"{name}_before")
        size = rows.shape
        if self.float_type is not np.float16:
            rows = Builder.cast(x=rows, dtype="fp16", name=f"{name}_half")
        begin = Builder.concat(
            values=[np.array([layer, 0], np.int32), start, np.array([0], np.int32)], axis=0, name=f"{name}_begin"
        )
        end = Builder.add(x=begin, y=np.array(size, np.int32), name=f"{name}_end")
        updated = Builder.slice_update(x=before, update=rows, begin=begin, end=end, name=f"{name}_updated")
        after = Builder.coreml_update_state(state=state, value=updated, name=f"{name}_after")
        self._read[which] = after
        mine = (1, *after.shape[1:])
        found = Builder.slice_by_size(x=after, begin=(layer, 0, 0, 0), size=mine, name=f"{name}_of_layer")
        return found if self.float_type is np.float16 else Builder.cast(x=found, dtype="fp32", name=f"{name}_wide")

    def _softcapped(self, name: str, scores: Any) -> Any:
        cap = self.attention.softcap
        if not cap:
            return scores
        small = Builder.mul(x=scores, y=self.float_type(1 / cap), name=f"{name}_part_of_cap")
        return Builder.mul(
            x=Builder.tanh(x=small, name=f"{name}_bounded"), y=self.float_type(cap), name=f"{name}_softcapped"
        )

    def _mask(self, start: Any, new: int, window: int) -> Any:
        """What is added to scores, [new, context]: 0 where a new token sees a position."""
        if not self._masks:
            self._places = self._draw_places(start, new)
        if window not in self._masks:
            self._masks[window] = self._draw_mask(f"mask_{window}", window, *self._places)
        return self._masks[window]

    def _draw_places(self, start: Any, new: int) -> tuple[Any, Any]:
        """The new tokens' positions, int32 [new, 1], and those of the cache, [1, context]."""
        numbers = np.arange(self.context, dtype=np.int32)
        after = self.weights.draw_array(f"mask_after_start_{new}", numbers[:new, None])
        rows = Builder.add(x=start, y=after, name="mask_rows")
        return rows, self.weights.draw_array("mask_places", numbers[None, :])

    def _draw_mask(self, name: str, window: int, rows: Any, places: Any) -> Any:
        seen = Builder.less_equal(x=places, y=rows, name=f"{name}_past")
        if window:
            oldest = Builder.sub(x=rows, y=np.int32(window), name=f"{name}_oldest")
            near = Builder.greater(x=places, y=oldest, name=f"{name}_near")
            seen = Builder.logical_and(x=seen, y=near, name=f"{name}_seen")
        ones = Builder.cast(x=seen, dtype="fp16" if self.float_type is np.float16 else "fp32", name=f"{name}_ones")
        below = Builder.sub(x=ones, y=self.float_type(1), name=f"{name}_below")
        return Builder.mul(x=below, y=self.float_type(HIDDEN), name=name)
