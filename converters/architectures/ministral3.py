"""Ministral 3: mistral with YaRN, and queries that grow with the position beyond the original context."""

from __future__ import annotations

from collections.abc import Mapping

from edgekit.config import ModelConfig

from .fields import ConfigFields
from .rope_fields import rope_from, rope_settings
from .standard import STANDARD_NAMES, decoder, head_size, layer_count, windowed_layers

__all__ = ["DEFAULTS", "NAMES", "describe"]

NAMES = STANDARD_NAMES
DEFAULTS: Mapping[str, object] = {
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262_144,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16_384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: ministral3` config."""
    fields = fields.with_defaults(DEFAULTS)
    scaling = rope_settings(fields)
    growth = {
        "query_growth": scaling.number("llama_4_scaling_beta"),
        "query_growth_context": scaling.size("original_max_position_embeddings"),
    }
    kind = "sliding_attention" if fields.has("sliding_window") else "full_attention"
    layers = windowed_layers(fields, (kind,) * layer_count(fields), rope_from(fields, head_size(fields)))
    return decoder(fields, layers=layers, attention_bias=False, attention=growth)
