"""Qwen 2 and 2.5, DeepSeek distillations of Qwen: llama with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping

from edgekit.config import LayerConfig, ModelConfig

from .fields import ConfigFields
from .rope_fields import rope_from
from .standard import STANDARD_NAMES, decoder, head_size, layer_count, layer_kinds, windowed_layers

__all__ = ["DEFAULTS", "NAMES", "describe", "qwen_layers"]

NAMES = STANDARD_NAMES
DEFAULTS: Mapping[str, object] = {
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
}


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: qwen2` config."""
    fields = fields.with_defaults(DEFAULTS)
    attention = {"qkv_bias": True, "output_bias": False}
    return decoder(fields, layers=qwen_layers(fields), attention=attention)


def qwen_layers(fields: ConfigFields) -> tuple[LayerConfig, ...]:
    """Sliding windows, where they are switched on, from layer `max_window_layers` up."""
    count = layer_count(fields)
    sliding = fields.flag("use_sliding_window", False) and fields.has("sliding_window")
    first = int(fields.number("max_window_layers", 28)) if sliding else count
    default = tuple("sliding_attention" if index >= first else "full_attention" for index in range(count))
    kinds = layer_kinds(fields, default) if sliding else default
    return windowed_layers(fields, kinds, rope_from(fields, head_size(fields)))
