"""What the described architectures share: llama's layout, from which each departs in a few points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekit.config import Activation, AttentionConfig, LayerConfig, ModelConfig, RopeConfig
from edgekit.errors import UnsupportedError

from .fields import ConfigFields
from .rope_fields import rope_from

__all__ = [
    "FUSED_NAMES",
    "GEMMA_NORM_NAMES",
    "STANDARD_NAMES",
    "decoder",
    "head_size",
    "layer_count",
    "layer_kinds",
    "windowed_layers",
]

MOST_LAYERS = 4096  # the largest models have some 130; a layer takes memory here before any weight is seen
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}

# Role -> tensors whose rows make it up. `{}` is the layer's index.
STANDARD_NAMES: Mapping[str, tuple[str, ...]] = {
    "embedding": ("model.embed_tokens.weight",),
    "final_norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
    "attention_norm": ("model.layers.{}.input_layernorm.weight",),
    "qkv": tuple(f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkv"),
    "qkv_bias": tuple(f"model.layers.{{}}.self_attn.{name}_proj.bias" for name in "qkv"),
    "query_norm": ("model.layers.{}.self_attn.q_norm.weight",),
    "key_norm": ("model.layers.{}.self_attn.k_norm.weight",),
    "output": ("model.layers.{}.self_attn.o_proj.weight",),
    "output_bias": ("model.layers.{}.self_attn.o_proj.bias",),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm.weight",),
    "gate_up": ("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
    "gate_up_bias": ("model.layers.{}.mlp.gate_proj.bias", "model.layers.{}.mlp.up_proj.bias"),
    "down": ("model.layers.{}.mlp.down_proj.weight",),
    "down_bias": ("model.layers.{}.mlp.down_proj.bias",),
}
FUSED_NAMES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("model.layers.{}.self_attn.qkv_proj.weight",),
    "gate_up": ("model.layers.{}.mlp.gate_up_proj.weight",),
}
GEMMA_NORM_NAMES: Mapping[str, tuple[str, ...]] = {
    "post_attention_norm": ("model.layers.{}.post_attention_layernorm.weight",),
    "mlp_norm": ("model.layers.{}.pre_feedforward_layernorm.weight",),
    "post_mlp_norm": ("model.layers.{}.post_feedforward_layernorm.weight",),
}


def decoder(
    fields: ConfigFields,
    *,
    layers: tuple[LayerConfig, ...] | None = None,
    theta: float = 10_000.0,
    activation_key: str = "hidden_act",
    attention_bias: bool | None = None,
    attention: Mapping[str, Any] | None = None,
    **changes: Any,
) -> ModelConfig:
    """Describe a llama-like decoder.

    Args:
        fields: The checkpoint's config.
        layers: Where layers differ from each other; otherwise all have the config's rotation and full attention.
        theta: Rotary base where the config names none.
        activation_key: Where the config keeps the activation's name.
        attention_bias: Biases on query, key, value and output; None reads `attention_bias`.
        attention: Fields of AttentionConfig that depart from llama's.
        **changes: Fields of ModelConfig that depart from llama's.

    Raises:
        SourceError, UnsupportedError: As `ConfigFields`, and for an activation that is not handled.
    """
    hidden, heads, head_dim = fields.size("hidden_size"), fields.size("num_attention_heads"), head_size(fields)
    kv_heads = fields.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.wrong("num_attention_heads", heads, f"a multiple of {kv_heads} key-value heads")
    bias = fields.flag("attention_bias", False) if attention_bias is None else attention_bias
    attention_fields = {"scale": head_dim**-0.5, "qkv_bias": bias, "output_bias": bias} | dict(attention or {})
    count = layer_count(fields)
    values: dict[str, Any] = {
        "model_type": fields.text("model_type"),
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.size("intermediate_size"),
        "context": fields.size("max_position_embeddings"),
        "attention": AttentionConfig(heads, kv_heads, head_dim, **attention_fields),
        "layers": layers or (LayerConfig(rope_from(fields, head_dim, theta=theta)),) * count,
        "norm_eps": fields.positive("rms_norm_eps", 1e-6),
        "activation": _activation(fields, activation_key),
        "mlp_bias": fields.flag("mlp_bias", False),
        "tied_embeddings": fields.flag("tie_word_embeddings", False),
    }
    return ModelConfig(**(values | changes))


def layer_count(fields: ConfigFields) -> int:
    """Number of layers."""
    return fields.size("num_hidden_layers", most=MOST_LAYERS)


def head_size(fields: ConfigFields) -> int:
    """Size of one attention head; even, since rotation works on pairs."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if not fields.has("head_dim") and hidden % heads:
        raise fields.wrong("hidden_size", hidden, f"a multiple of {heads} attention heads")
    head_dim = fields.size("head_dim", max(hidden // heads, 1))
    if head_dim % 2:
        raise fields.wrong("head_dim", head_dim, "an even number")
    return head_dim


def layer_kinds(fields: ConfigFields, default: tuple[str, ...]) -> tuple[str, ...]:
    """`full_attention` or `sliding_attention` for each layer.

    Raises:
        UnsupportedError: A layer is of another kind.
    """
    kinds = fields.items("layer_types", len(default)) if fields.has("layer_types") else default
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(
                f"layer type {kind!r} is not supported", hint="supported: full_attention, sliding_attention"
            )
    return tuple(str(kind) for kind in kinds)


def windowed_layers(fields: ConfigFields, kinds: tuple[str, ...], rope: RopeConfig) -> tuple[LayerConfig, ...]:
    """Layers that share one rotation; those of kind `sliding_attention` see the config's window."""
    window = fields.size("sliding_window") if "sliding_attention" in kinds else 0
    return tuple(LayerConfig(rope, window if kind == "sliding_attention" else 0) for kind in kinds)


def _activation(fields: ConfigFields, key: str) -> Activation:
    name = fields.text(key)
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"activation {name!r} is not supported", hint=f"supported: {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[name]
