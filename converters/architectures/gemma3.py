"""Gemma 3 text models: query and key norms, five sliding layers for each full one, a rotation for each kind."""

from __future__ import annotations

from collections.abc import Mapping

from edgekit.config import LayerConfig, ModelConfig
from edgekit.errors import UnsupportedError

from . import gemma2
from .fields import ConfigFields
from .gemma2 import NAMES, gemma_decoder
from .rope_fields import rope_from
from .standard import head_size, layer_count, layer_kinds

__all__ = ["DEFAULTS", "NAMES", "describe"]

DEFAULTS: Mapping[str, object] = {
    **gemma2.DEFAULTS,
    "max_position_embeddings": 131_072,
    # The multimodal checkpoints leave out even sizes.
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "vocab_size": 262_208,
}
GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
DEFAULT_PATTERN = 6


def describe(fields: ConfigFields) -> ModelConfig:
    """Map a `model_type: gemma3_text` config."""
    fields = fields.with_defaults(DEFAULTS)
    if fields.flag("use_bidirectional_attention", False):
        raise UnsupportedError("use_bidirectional_attention is an encoder's setting", hint="use a generative Gemma 3")
    pattern = fields.size("sliding_window_pattern", DEFAULT_PATTERN)
    count = layer_count(fields)
    default = tuple("sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(count))
    attention = {"query_key_norm": True, "softcap": fields.number("attn_logit_softcapping", 0.0)}
    softcap = fields.number("final_logit_softcapping", 0.0)
    return gemma_decoder(fields, _layers(fields, layer_kinds(fields, default)), attention, logits_softcap=softcap)


def _layers(fields: ConfigFields, kinds: tuple[str, ...]) -> tuple[LayerConfig, ...]:
    head_dim = head_size(fields)
    nested = fields.nested("rope_parameters")
    full_values = {**nested.nested("full_attention").values, **fields.nested("rope_scaling").values}
    local_theta = {"rope_theta": fields.positive("rope_local_base_freq", LOCAL_THETA)}
    local_values = {**local_theta, **nested.nested("sliding_attention").values}
    full = rope_from(fields, head_dim, theta=GLOBAL_THETA, scaling=ConfigFields(full_values, fields.origin))
    local = rope_from(fields, head_dim, scaling=ConfigFields(local_values, fields.origin))
    window = fields.size("sliding_window") if "sliding_attention" in kinds else 0
    return tuple(LayerConfig(local, window) if kind == "sliding_attention" else LayerConfig(full) for kind in kinds)
