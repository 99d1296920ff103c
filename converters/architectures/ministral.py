"""Ministral 8B: mistral with a kind for each layer, windowed or full."""

from __future__ import annotations

from edgekit.config import ModelConfig

from .fields import ConfigFields
from .mistral import DEFAULTS
from .rope_fields import rope_from
from .standard import STANDARD_NAMES, decoder, head_size, layer_count, layer_kinds, windowed_layers

__all__ = ["DEFAULTS", "NAMES", "describe"]

NAMES = STANDARD_NAMES


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: ministral` config."""
    fields = fields.with_defaults(DEFAULTS)
    kind = "sliding_attention" if fields.has("sliding_window") else "full_attention"
    kinds = layer_kinds(fields, (kind,) * layer_count(fields))
    layers = windowed_layers(fields, kinds, rope_from(fields, head_size(fields)))
    return decoder(fields, layers=layers, attention_bias=False)
