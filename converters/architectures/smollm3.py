"""SmolLM3: llama without positions on every fourth layer."""

from __future__ import annotations

from collections.abc import Mapping

from edgekit.config import LayerConfig, ModelConfig

from .fields import ConfigFields
from .rope_fields import rope_from
from .standard import STANDARD_NAMES, decoder, head_size, layer_count, layer_kinds

__all__ = ["DEFAULTS", "NAMES", "describe"]

NAMES = STANDARD_NAMES
DEFAULTS: Mapping[str, object] = {
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 4,
}
DEFAULT_THETA = 2_000_000.0


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: smollm3` config."""
    fields = fields.with_defaults(DEFAULTS)
    count = layer_count(fields)
    interval = fields.size("no_rope_layer_interval", 4)
    rotated = (
        tuple(bool(flag) for flag in fields.items("no_rope_layers", count))
        if fields.has("no_rope_layers")
        else tuple(bool((index + 1) % interval) for index in range(count))
    )
    sliding = fields.flag("use_sliding_window", False) and fields.has("sliding_window")
    default = tuple("sliding_attention" if sliding and not flag else "full_attention" for flag in rotated)
    kinds = layer_kinds(fields, default)
    window = fields.size("sliding_window") if "sliding_attention" in kinds else 0
    rope = rope_from(fields, head_size(fields), theta=DEFAULT_THETA)
    layers = tuple(
        LayerConfig(rope if flag else None, window if kind == "sliding_attention" else 0)
        for flag, kind in zip(rotated, kinds, strict=True)
    )
    return decoder(fields, layers=layers, tied_embeddings=fields.flag("tie_word_embeddings", True))
