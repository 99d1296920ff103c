"""A GGUF's metadata in the words of a Hugging Face config, and its tensor names as Hugging Face writes them.

The meaning of the keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's model loaders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import SourceError, UnsupportedError
from edgekit.source import require_supported

from .gguf_header import TensorEntry

__all__ = ["hugging_face_config", "hugging_face_names", "is_described", "permuted_heads"]

_MODEL_TYPES: Mapping[str, str] = {
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "llama": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
_INTERLEAVED = {"llama", "smollm3"}  # their query and key rows are stored for ggml's pairwise rotation
_KEYS: Mapping[str, str] = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope_local_base_freq": "rope.freq_base_swa",
}
_WHOLE_NAMES: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_NAMES = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Layers of the Gemma 27B models, whose attention is scaled by hidden size / heads instead of the head's size.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3_text": 62}


def hugging_face_config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorEntry],
    rope_factors: Mapping[str, NDArray[np.float32]],
) -> dict[str, Any]:
    """Translate the metadata.

    Args:
        rope_factors: The tensors that hold rotary divisors, read.

    Raises:
        UnsupportedError: The architecture is not described.
        SourceError: Metadata are missing or contradict each other.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise SourceError("the GGUF names no architecture", hint="the file is damaged; fetch it again")
    require_supported("GGUF architecture", architecture, _MODEL_TYPES)
    model_type = _MODEL_TYPES[architecture]
    values = {
        name: metadata[f"{architecture}.{key}"] for name, key in _KEYS.items() if f"{architecture}.{key}" in metadata
    }
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise SourceError("the GGUF has no tensor token_embd.weight", hint="it is not a language model, or incomplete")
    values |= {
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    values["rope_scaling"] = _rope_scaling(metadata, architecture, rope_factors)
    if values.get("sliding_window") == 0:  # llama.cpp writes zero for none
        values["sliding_window"] = None
    if model_type == "gemma3_text" and not values.get("sliding_window"):
        # llama.cpp: full attention in every layer, all rotated as the global ones are.
        values |= {"sliding_window": None, "sliding_window_pattern": 1}
    head_dim, rotated = _head_dim(values), metadata.get(f"{architecture}.rope.dimension_count")
    if isinstance(rotated, int) and head_dim and rotated != head_dim:
        values["partial_rotary_factor"] = rotated / head_dim
    original = metadata.get(f"{architecture}.rope.scaling.original_context_length")
    if original:
        values["original_max_position_embeddings"] = original
    if model_type in _GEMMA_27B_LAYERS:
        values |= _gemma_values(model_type, values, head_dim)
    if model_type in {"qwen2", "qwen3"}:
        values["sliding_window"] = None
    return values


def is_described(metadata: Mapping[str, Any]) -> bool:
    """True where the architecture is one that EdgeKit converts; llama's also names mixtures of experts, which are not."""
    architecture = str(metadata.get("general.architecture"))
    return architecture in _MODEL_TYPES and not metadata.get(f"{architecture}.expert_count")


def _head_dim(values: Mapping[str, Any]) -> int:
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    default = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 0
    head_dim = values.get("head_dim", default)
    return head_dim if isinstance(head_dim, int) else 0


def _rope_scaling(
    metadata: Mapping[str, Any], architecture: str, rope_factors: Mapping[str, NDArray[np.float32]]
) -> dict[str, Any] | None:
    prefix = f"{architecture}.rope.scaling."
    if "rope_factors_long.weight" in rope_factors and "rope_factors_short.weight" in rope_factors:
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "long_factor": rope_factors["rope_factors_long.weight"].tolist(),
            "short_factor": rope_factors["rope_factors_short.weight"].tolist(),
        }
        if metadata.get(prefix + "attn_factor"):
            scaling["attention_factor"] = metadata[prefix + "attn_factor"]
        return scaling
    if "rope_freqs.weight" in rope_factors:
        return {"rope_type": "factors", "factors": rope_factors["rope_freqs.weight"].tolist()}
    kind = metadata.get(prefix + "type", "none")
    if kind == "none":
        return None
    if kind == "dynamic":  # a Hugging Face type; llama.cpp has none of that name
        raise UnsupportedError("rope type 'dynamic' is not known in a GGUF", hint="use the model's safetensors")
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if metadata.get(prefix + key, 1.0) != 1.0:
            raise UnsupportedError(
                f"the GGUF sets {prefix}{key}, which is not handled", hint="use the model's safetensors"
            )
    scaling = {"rope_type": kind, "factor": metadata.get(prefix + "factor")}
    for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if metadata.get(prefix + key):
            scaling[name] = metadata[prefix + key]
    return scaling


def _gemma_values(model_type: str, values: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    scalar: float = head_dim
    if values.get("num_hidden_layers") == _GEMMA_27B_LAYERS[model_type]:
        hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
        scalar = hidden / heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 0
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "norm_offset": 0.0,  # the converter has already added the one
        "query_pre_attn_scalar": scalar,
    }


def hugging_face_names(model_type: str, tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
    """GGUF tensor name -> Hugging Face name, for the names that are known."""
    layer_names = dict(_LAYER_NAMES)
    if model_type in _GEMMA_27B_LAYERS:
        layer_names |= _GEMMA_NAMES
    if model_type == "phi3":
        layer_names["ffn_up"] = "mlp.gate_up_proj"
    names = {}
    for name in tensors:
        if name in _WHOLE_NAMES:
            names[name] = _WHOLE_NAMES[name]
        elif name.startswith("blk.") and name.count(".") == 3:
            _, index, part, kind = name.split(".")
            if part in layer_names:
                names[name] = f"model.layers.{index}.{layer_names[part]}.{kind}"
    return names


def permuted_heads(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """The head size where query and key rows are stored interleaved, else 0."""
    return _head_dim(config) if metadata.get("general.architecture") in _INTERLEAVED else 0
