"""The families that EdgeKit does not convert yet but can plan for, by `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from edgekit.anatomy import Anatomy
from edgekit.converters.architectures.fields import ConfigFields

from .family import Family, Mixture, describe_family
from .gemma import describe_gemma3n, describe_gemma4
from .parts import Mixer, gated_delta, grouped_query, latent, mamba2, short_convolution
from .rules import (
    after_dense,
    alternating,
    ernie_sparse,
    granite_sparse,
    lfm2_kinds,
    lfm2_sparse,
    linear_intervals,
    llama4_kinds,
    llama4_sparse,
    qwen_sparse,
    sliding_everywhere,
    sliding_intervals,
)

__all__ = ["DESCRIBED", "MULTIMODAL_TEXT", "describe"]


def _times(count_key: str, size_key: str) -> Callable[[ConfigFields], int]:
    """Width of several shared experts side by side; none where the config has none."""
    return lambda fields: fields.size(count_key) * fields.size(size_key) if fields.values.get(count_key) else 0


def _named(key: str) -> Callable[[ConfigFields], int]:
    return lambda fields: fields.size(key) if fields.values.get(key) else 0


def _lfm2_size(fields: ConfigFields) -> int:
    """LFM2 rounds two thirds of the configured width up, as llama 1 did."""
    size = fields.size("block_ff_dim") if fields.has("block_ff_dim") else fields.size("intermediate_size")
    if not fields.flag("block_auto_adjust_ff_dim", True):
        return size
    multiple = fields.size("block_multiple_of", 256)
    size = int(fields.positive("block_ffn_dim_multiplier", 1.0) * int(2 * size / 3))
    return -(-size // multiple) * multiple


_N_SHARED = _times("n_shared_experts", "moe_intermediate_size")
_QWEN_MIXTURE = Mixture(sparse=qwen_sparse, shared_size=_named("shared_expert_intermediate_size"), shared_gate=True)
_WIDE_MIXTURE = Mixture(size="intermediate_size")
_LATENT = {"full_attention": latent}
_DELTA: Mapping[str, Mixer] = {
    "full_attention": partial(grouped_query, gated=True, norm="head"),
    "linear_attention": gated_delta,
}
_QWEN3_NEXT = Family(mixers=_DELTA, kinds=linear_intervals, mixture=_QWEN_MIXTURE)
_DEEPSEEK_V3 = Family(mixers=_LATENT, mixture=Mixture(sparse=after_dense(0), shared_size=_N_SHARED))
_GRANITE_MOE = Family(bias="attention_bias", output_bias="attention_bias", mixture=_WIDE_MIXTURE)
_SHARED_GRANITE = replace(_WIDE_MIXTURE, sparse=granite_sparse, shared_size=_named("shared_intermediate_size"))
_PLAIN_BIASES = Family(bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias")
_LFM2 = Family(norm="head", tied=True, mixers={"conv": short_convolution}, kinds=lfm2_kinds, dense_size=_lfm2_size)

_INDEXED = replace(_DEEPSEEK_V3, mixers={"full_attention": partial(latent, indexed=True)})

_FAMILIES: Mapping[str, Family] = {
    "arcee": replace(_PLAIN_BIASES, gated=False),
    "cohere2": Family(norms=1, tied=True, kinds=sliding_intervals("sliding_window_pattern", 4)),
    "deepseek_v2": _DEEPSEEK_V3,
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _INDEXED,
    "ernie4_5": Family(bias="use_bias", output_bias="use_bias", mlp_bias="use_bias", tied=True),
    "ernie4_5_moe": Family(
        bias="use_bias",
        output_bias="use_bias",
        tied=True,
        mixture=Mixture(
            count=("moe_num_experts",),
            picked="moe_k",
            sparse=ernie_sparse,
            shared_size=_times("moe_num_shared_experts", "moe_intermediate_size"),
            router_bias=True,
        ),
    ),
    "exaone4": Family(norm="head", kinds=sliding_intervals("sliding_window_pattern", 4)),
    "exaone_moe": Family(
        norm="head",
        kinds=sliding_intervals("sliding_window_pattern", 4),
        mixture=Mixture(sparse=after_dense(1), shared_size=_times("num_shared_experts", "moe_intermediate_size")),
    ),
    "gemma": Family(tied=True),
    "glm": Family(bias="attention_bias"),
    "glm4": Family(bias="attention_bias", norms=4),
    "glm4_moe": Family(
        bias="attention_bias", norm="use_qk_norm", mixture=Mixture(sparse=after_dense(1), shared_size=_N_SHARED)
    ),
    "glm4_moe_lite": Family(mixers=_LATENT, mixture=Mixture(sparse=after_dense(1), shared_size=_N_SHARED)),
    "glm_moe_dsa": replace(_INDEXED, mixture=Mixture(sparse=after_dense(3), shared_size=_N_SHARED)),
    "gpt_oss": Family(
        bias=True,
        output_bias=True,
        sinks=True,
        kinds=alternating,
        mixture=replace(_WIDE_MIXTURE, bias=True, router_bias=True),
    ),
    "granite": _PLAIN_BIASES,
    "granitemoe": _GRANITE_MOE,
    "granitemoehybrid": replace(
        _GRANITE_MOE,
        mixture=_SHARED_GRANITE,
        mixers={"linear_attention": mamba2},
        dense_size=_named("shared_intermediate_size"),
    ),
    "granitemoeshared": replace(_GRANITE_MOE, mixture=_SHARED_GRANITE),
    "helium": _PLAIN_BIASES,
    "kimi_k2": _DEEPSEEK_V3,
    "lfm2": _LFM2,
    "lfm2_moe": replace(_LFM2, dense_size=None, mixture=Mixture(sparse=lfm2_sparse)),
    "llama4_text": Family(
        kinds=llama4_kinds,
        mixture=replace(
            _WIDE_MIXTURE,
            sparse=llama4_sparse,
            shared_size=_named("intermediate_size"),
            dense_key="intermediate_size_mlp",
        ),
    ),
    "minimax_m2": Family(norm="heads", mixture=_WIDE_MIXTURE),
    "mixtral": Family(mixture=_WIDE_MIXTURE, kinds=sliding_everywhere),
    "nemotron": replace(_PLAIN_BIASES, norms=4, final_norms=2, gated=False),
    "olmo": Family(norms=0, final_norms=0, bias="attention_bias", output_bias="attention_bias"),
    "olmo2": Family(norm="heads"),
    "olmo3": Family(norm="heads", kinds=sliding_intervals("sliding_window_pattern", 4)),
    "olmoe": Family(norm="heads", mixture=_WIDE_MIXTURE),
    "phi": Family(bias=True, output_bias=True, final_norms=2, gated=False, mlp_bias=True, head_bias=True),
    "phimoe": Family(
        norms=4,
        final_norms=2,
        bias="attention_bias",
        output_bias="attention_bias",
        head_bias="lm_head_bias",
        mixture=_WIDE_MIXTURE,
    ),
    "qwen2_moe": Family(bias=True, mixture=_QWEN_MIXTURE),
    "qwen3_5_moe_text": _QWEN3_NEXT,
    "qwen3_5_text": replace(_QWEN3_NEXT, mixture=None),
    "qwen3_moe": Family(
        bias="attention_bias", output_bias="attention_bias", norm="head", mixture=Mixture(sparse=qwen_sparse)
    ),
    "qwen3_next": _QWEN3_NEXT,
    "seed_oss": Family(bias="attention_bias", output_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "solar_open": Family(mixture=Mixture(shared_size=_N_SHARED)),
    "stablelm": Family(norms=4, final_norms=2, bias="use_qkv_bias"),
    "starcoder2": Family(
        norms=4,
        final_norms=2,
        bias="use_bias",
        output_bias="use_bias",
        gated=False,
        mlp_bias="use_bias",
        tied=True,
        kinds=sliding_everywhere,
    ),
}
_OWN: Mapping[str, Callable[[ConfigFields], Anatomy]] = {
    "gemma3n_text": describe_gemma3n,
    "gemma4_text": describe_gemma4,
}
DESCRIBED = frozenset({*_FAMILIES, *_OWN})
# The type of a multimodal checkpoint's text part, where that does not say it.
MULTIMODAL_TEXT: Mapping[str, str] = {
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}


def describe(fields: ConfigFields) -> Anatomy:
    """The anatomy of a config whose `model_type` is in DESCRIBED.

    Raises:
        SourceError: A value is missing or impossible.
        UnsupportedError: It has a layer of a kind that is not known.
    """
    model_type = fields.text("model_type")
    if model_type in _OWN:
        return _OWN[model_type](fields)
    return describe_family(fields, _FAMILIES[model_type])
