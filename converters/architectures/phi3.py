"""Phi-3, 3.5 and Phi-4-mini: fused projections, longrope, partial rotation, a sliding window on every layer."""

from __future__ import annotations

from edgekit.config import ModelConfig

from .fields import ConfigFields
from .rope_fields import rope_from
from .standard import FUSED_NAMES, STANDARD_NAMES, decoder, head_size, layer_count, windowed_layers

__all__ = ["NAMES", "describe"]

NAMES = {**STANDARD_NAMES, **FUSED_NAMES}
_LONGROPE_NAMES = {"su", "yarn"}  # early Phi-3 checkpoints call longrope so


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: phi3` config."""
    kind = "sliding_attention" if fields.has("sliding_window") else "full_attention"
    kinds = (kind,) * layer_count(fields)
    scaling = fields.nested("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
    if scaling.text("rope_type", scaling.text("type", "default")) in _LONGROPE_NAMES:
        scaling = ConfigFields({**scaling.values, "rope_type": "longrope"}, scaling.origin)
    rope = rope_from(fields, head_size(fields), scaling=scaling)
    return decoder(fields, layers=windowed_layers(fields, kinds, rope), attention_bias=False)
