"""Phi-3, 3.5 and Phi-4-mini: fused projections, longrope, partial rotation, a sliding window on every layer."""

from __future__ import annotations

from collections.abc import Mapping

from edgekit.config import ModelConfig

from .fields import ConfigFields
from .rope_fields import rope_from, rope_settings
from .standard import FUSED_NAMES, STANDARD_NAMES, decoder, head_size, layer_count, windowed_layers

__all__ = ["DEFAULTS", "NAMES", "describe"]

NAMES = {**STANDARD_NAMES, **FUSED_NAMES}
DEFAULTS: Mapping[str, object] = {
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: phi3` config."""
    fields = fields.with_defaults(DEFAULTS)
    kind = "sliding_attention" if fields.has("sliding_window") else "full_attention"
    kinds = (kind,) * layer_count(fields)
    scaling = rope_settings(fields)
    if scaling.text("rope_type", scaling.text("type", "default")) == "yarn":  # so early Phi-3 checkpoints call longrope
        scaling = ConfigFields({**scaling.values, "rope_type": "longrope"}, scaling.origin)
    rope = rope_from(fields, head_size(fields), scaling=scaling)
    return decoder(fields, layers=windowed_layers(fields, kinds, rope), attention_bias=False)
