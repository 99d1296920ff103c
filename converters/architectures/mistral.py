"""Mistral 7B and its descendants: llama with a sliding window on every layer, where the config names one."""

from __future__ import annotations

from edgekit.config import ModelConfig

from .fields import ConfigFields
from .rope_fields import rope_from
from .standard import STANDARD_NAMES, decoder, head_size, layer_count, windowed_layers

__all__ = ["NAMES", "describe"]

NAMES = STANDARD_NAMES


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: mistral` config."""
    kind = "sliding_attention" if fields.has("sliding_window") else "full_attention"
    kinds = (kind,) * layer_count(fields)
    layers = windowed_layers(fields, kinds, rope_from(fields, head_size(fields)))
    return decoder(fields, layers=layers, attention_bias=False)
