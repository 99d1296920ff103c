"""Mistral 7B and its descendants: llama with a sliding window on every layer, where the config names one."""

from __future__ import annotations

from collections.abc import Mapping

from edgekit.config import ModelConfig

from .fields import ConfigFields
from .rope_fields import rope_from
from .standard import STANDARD_NAMES, decoder, head_size, layer_count, windowed_layers

__all__ = ["DEFAULTS", "NAMES", "describe"]

NAMES = STANDARD_NAMES
DEFAULTS: Mapping[str, object] = {
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: mistral` config."""
    fields = fields.with_defaults(DEFAULTS)
    kind = "sliding_attention" if fields.has("sliding_window") else "full_attention"
    kinds = (kind,) * layer_count(fields)
    layers = windowed_layers(fields, kinds, rope_from(fields, head_size(fields)))
    return decoder(fields, layers=layers, attention_bias=False)
