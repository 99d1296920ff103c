"""Gemma 2: norms before and after each block, soft caps, sliding windows on every other layer, scaled embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekit.config import LayerConfig, ModelConfig

from .fields import ConfigFields
from .rope_fields import rope_from
from .standard import GEMMA_NORM_NAMES, STANDARD_NAMES, decoder, head_size, layer_count, layer_kinds, windowed_layers

__all__ = ["DEFAULTS", "NAMES", "describe", "gemma_decoder"]

NAMES = {**STANDARD_NAMES, **GEMMA_NORM_NAMES}
DEFAULTS: Mapping[str, object] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
}


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: gemma2` config."""
    fields = fields.with_defaults(DEFAULTS)
    count = layer_count(fields)
    default = tuple("full_attention" if index % 2 else "sliding_attention" for index in range(count))
    layers = windowed_layers(fields, layer_kinds(fields, default), rope_from(fields, head_size(fields)))
    softcaps = _softcap(fields, "attn_logit_softcapping", 50.0), _softcap(fields, "final_logit_softcapping", 30.0)
    return gemma_decoder(fields, layers, {"softcap": softcaps[0]}, logits_softcap=softcaps[1])


def gemma_decoder(
    fields: ConfigFields, layers: tuple[LayerConfig, ...], attention: dict[str, Any], **changes: Any
) -> ModelConfig:
    """What Gemma 2 and 3 share."""
    scale = fields.positive("query_pre_attn_scalar", 256) ** -0.5
    return decoder(
        fields,
        layers=layers,
        activation_key="hidden_activation",
        attention={"scale": scale} | attention,
        norm="sandwich",
        norm_offset=fields.number("norm_offset", 1.0),
        embedding_scale=fields.size("hidden_size") ** 0.5,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        **changes,
    )


def _softcap(fields: ConfigFields, key: str, default: float) -> float:
    # An explicit null switches the cap off; an absent key is the published default.
    return fields.number(key, 0.0) if key in fields.values else default
