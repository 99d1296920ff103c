"""What well-known checkpoints' config.json say of their decoder, written from memory; keys that no decoder reads are left out."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int) -> Values:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
    }


def without(values: Values, *keys: str) -> Values:
    return {key: value for key, value in values.items() if key not in keys}


def llama3_scaling(factor: float) -> Values:
    return {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


def longrope(**values: Any) -> Values:
    """The lists have one factor for each of 48 pairs; their values are made up."""
    short, long = [1.0 + index / 16 for index in range(48)], [1.0 + index for index in range(48)]
    return {"type": "longrope", "short_factor": short, "long_factor": long} | values


LLAMA: Values = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "attention_bias": False,
}
LLAMA |= {"tie_word_embeddings": False, "pretraining_tp": 1}
LLAMA3: Values = LLAMA | {"rope_theta": 500000.0, "mlp_bias": False}
MISTRAL: Values = {"model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
QWEN2: Values = {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "use_sliding_window": False}
QWEN2 |= {"rope_theta": 1000000.0, "sliding_window": 32768, "max_window_layers": 21, "tie_word_embeddings": False}
QWEN3: Values = QWEN2 | {"model_type": "qwen3", "head_dim": 128, "attention_bias": False, "rope_scaling": None}
QWEN3 |= {"sliding_window": None, "max_window_layers": 28}
PHI3: Values = {
    "model_type": "phi3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
PHI3 |= {"original_max_position_embeddings": 4096, "attention_bias": False, "tie_word_embeddings": False}
GEMMA2: Values = {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
GEMMA2 |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6, "head_dim": 256}
GEMMA2 |= {"rope_theta": 10000.0, "sliding_window": 4096, "query_pre_attn_scalar": 256, "attention_bias": False}
GEMMA3: Values = GEMMA2 | {"model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None}
GEMMA3 |= {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None, "sliding_window": 512}
SMOLLM2: Values = LLAMA | {"rope_interleaved": False, "is_llama_config": True, "mlp_bias": False}
YARN: Values = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}

MINISTRAL3_ROPE: Values = {"type": "yarn", "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0}
MINISTRAL3_ROPE |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
MINISTRAL3_ROPE |= {"original_max_position_embeddings": 16384, "llama_4_scaling_beta": 0.1}
SMOLLM3_ROTATED = [1, 1, 1, 0] * 9

PUBLISHED: dict[str, Values] = {
    "Llama-2-7b": LLAMA | sizes(4096, 11008, 32, 32, 32, 32000, 4096),
    "CodeLlama-7b": LLAMA | sizes(4096, 11008, 32, 32, 32, 32016, 16384) | {"rope_theta": 1000000},
    "vicuna-7b-v1.5-16k": LLAMA
    | without(sizes(4096, 11008, 32, 32, 32, 32000, 4096), "num_key_value_heads")
    | {"rope_scaling": {"factor": 4.0, "type": "linear"}},
    "deepseek-coder-6.7b": LLAMA
    | sizes(4096, 11008, 32, 32, 32, 32256, 16384)
    | {"rope_theta": 100000, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    "Llama-3-8B": LLAMA3 | sizes(4096, 14336, 32, 32, 8, 128256, 8192),
    "Llama-3.1-8B": LLAMA3 | sizes(4096, 14336, 32, 32, 8, 128256, 131072) | {"rope_scaling": llama3_scaling(8.0)},
    "Llama-3.2-1B": LLAMA3
    | sizes(2048, 8192, 16, 32, 8, 128256, 131072)
    | {"head_dim": 64, "rope_scaling": llama3_scaling(32.0), "tie_word_embeddings": True},
    "Llama-3.2-3B": LLAMA3
    | sizes(3072, 8192, 28, 24, 8, 128256, 131072)
    | {"head_dim": 128, "rope_scaling": llama3_scaling(32.0), "tie_word_embeddings": True},
    "Llama-3.3-70B": LLAMA3 | sizes(8192, 28672, 80, 64, 8, 128256, 131072) | {"rope_scaling": llama3_scaling(8.0)},
    "DeepSeek-R1-Distill-Llama-8B": LLAMA3
    | sizes(4096, 14336, 32, 32, 8, 128256, 131072)
    | {"rope_scaling": llama3_scaling(8.0)},
    "Llama-3-8B-dynamic": LLAMA3
    | sizes(4096, 14336, 32, 32, 8, 128256, 8192)
    | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "TinyLlama-1.1B": LLAMA | sizes(2048, 5632, 22, 32, 4, 32000, 2048),
    "open_llama_3b": without(LLAMA, "attention_bias", "rope_scaling", "pretraining_tp")
    | without(sizes(3200, 8640, 26, 32, 32, 32000, 2048), "num_key_value_heads")
    | {"rms_norm_eps": 1e-6},
    "h2o-danube3-4b": LLAMA | sizes(3840, 10240, 24, 32, 8, 32000, 8192) | {"head_dim": 120, "rope_theta": 100000},
    "h2o-danube3-500m": LLAMA | sizes(1536, 4096, 16, 16, 8, 32000, 8192) | {"head_dim": 96, "rope_theta": 100000},
    "h2o-danube-1.8b": MISTRAL | sizes(2560, 6912, 24, 32, 8, 32000, 16384) | {"sliding_window": 4096},
    "h2o-danube2-1.8b": MISTRAL | sizes(2560, 6912, 24, 32, 8, 32000, 8192) | {"sliding_window": None},
    "Yi-1.5-6B": LLAMA | sizes(4096, 11008, 32, 32, 4, 64000, 4096) | {"rope_theta": 5000000.0, "rms_norm_eps": 1e-6},
    "SmolLM2-135M": SMOLLM2
    | sizes(576, 1536, 30, 9, 3, 49152, 8192)
    | {"rope_theta": 100000, "tie_word_embeddings": True},
    "SmolLM2-1.7B": SMOLLM2
    | sizes(2048, 8192, 24, 32, 32, 49152, 8192)
    | {"rope_theta": 130000, "tie_word_embeddings": True},
    "SmolLM3-3B": {
        "model_type": "smollm3",
        **sizes(2048, 11008, 36, 16, 4, 128256, 65536),
        **{"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 5000000.0, "rope_scaling": None},
        **{"no_rope_layers": SMOLLM3_ROTATED, "no_rope_layer_interval": 4, "layer_types": ["full_attention"] * 36},
        **{"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28, "tie_word_embeddings": True},
    },
    "Mistral-7B-v0.1": MISTRAL
    | sizes(4096, 14336, 32, 32, 8, 32000, 32768)
    | {"rope_theta": 10000.0, "sliding_window": 4096},
    "Mistral-7B-v0.2": MISTRAL
    | sizes(4096, 14336, 32, 32, 8, 32000, 32768)
    | {"rope_theta": 1000000.0, "sliding_window": None},
    "Mistral-7B-v0.3": MISTRAL
    | sizes(4096, 14336, 32, 32, 8, 32768, 32768)
    | {"rope_theta": 1000000.0, "sliding_window": None},
    "Mistral-Nemo-12B": MISTRAL
    | sizes(5120, 14336, 40, 32, 8, 131072, 131072)
    | {"head_dim": 128, "rope_theta": 1000000.0, "sliding_window": None},
    "Ministral-8B-2410": MISTRAL
    | sizes(4096, 12288, 36, 32, 8, 131072, 32768)
    | {"head_dim": 128, "rope_theta": 100000000.0, "sliding_window": 32768},
    "Ministral-8B-2410-interleaved": MISTRAL
    | sizes(4096, 12288, 36, 32, 8, 131072, 131072)
    | {"model_type": "ministral", "head_dim": 128, "rope_theta": 100000000.0, "sliding_window": 32768}
    | {"layer_types": ["full_attention", *["sliding_attention"] * 3] * 9},
    "Ministral-3-8B-2512 (text)": MISTRAL
    | sizes(4096, 14336, 34, 32, 8, 131072, 262144)
    | {"model_type": "ministral3", "head_dim": 128, "sliding_window": None, "rope_parameters": MINISTRAL3_ROPE},
    "Mistral-Small-24B-2501": MISTRAL
    | sizes(5120, 32768, 40, 32, 8, 131072, 32768)
    | {"head_dim": 128, "rope_theta": 100000000.0, "sliding_window": None},
    "Qwen1.5-0.5B": QWEN2 | sizes(1024, 2816, 24, 16, 16, 151936, 32768) | {"tie_word_embeddings": True},
    "Qwen1.5-7B": QWEN2 | sizes(4096, 11008, 32, 32, 32, 151936, 32768) | {"max_window_layers": 28},
    "Qwen2-0.5B": QWEN2 | sizes(896, 4864, 24, 14, 2, 151936, 131072) | {"tie_word_embeddings": True},
    "Qwen2-7B": QWEN2
    | sizes(3584, 18944, 28, 28, 4, 152064, 131072)
    | {"sliding_window": 131072, "max_window_layers": 28},
    "Qwen2.5-7B": QWEN2 | sizes(3584, 18944, 28, 28, 4, 152064, 32768) | {"max_window_layers": 28},
    "Qwen2.5-7B-yarn": QWEN2 | sizes(3584, 18944, 28, 28, 4, 152064, 32768) | {"rope_scaling": YARN},
    "Qwen2.5-7B-yarn-128k": QWEN2 | sizes(3584, 18944, 28, 28, 4, 152064, 131072) | {"rope_scaling": YARN},
    "Qwen2.5-sliding": QWEN2
    | sizes(3584, 18944, 28, 28, 4, 152064, 32768)
    | {"use_sliding_window": True, "sliding_window": 4096},
    "DeepSeek-R1-Distill-Qwen-1.5B": QWEN2
    | sizes(1536, 8960, 28, 12, 2, 151936, 131072)
    | {"rope_theta": 10000, "sliding_window": 4096, "use_mrope": False},
    "Qwen3-0.6B": QWEN3 | sizes(1024, 3072, 28, 16, 8, 151936, 40960) | {"tie_word_embeddings": True},
    "Qwen3-8B": QWEN3 | sizes(4096, 12288, 36, 32, 8, 151936, 40960),
    "Qwen3-32B": QWEN3 | sizes(5120, 25600, 64, 64, 8, 151936, 40960) | {"max_window_layers": 64},
    "Qwen3-32B-yarn": QWEN3
    | sizes(5120, 25600, 64, 64, 8, 151936, 40960)
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    "Qwen3-4B-2507": QWEN3
    | sizes(2560, 9728, 36, 32, 8, 151936, 262144)
    | {"rope_theta": 5000000, "tie_word_embeddings": True},
    "Phi-3-mini-4k": PHI3 | sizes(3072, 8192, 32, 32, 32, 32064, 4096) | {"sliding_window": 2047},
    "Phi-3-mini-128k": PHI3
    | sizes(3072, 8192, 32, 32, 32, 32064, 131072)
    | {"rope_scaling": longrope(), "sliding_window": 262144},
    "Phi-3-medium-4k": PHI3 | sizes(5120, 17920, 40, 40, 10, 32064, 4096) | {"sliding_window": 2047},
    "Phi-4": PHI3
    | sizes(5120, 17920, 40, 40, 10, 100352, 16384)
    | {"original_max_position_embeddings": 16384, "rope_theta": 250000, "sliding_window": None},
    "Phi-4-reasoning": PHI3
    | sizes(5120, 17920, 40, 40, 10, 100352, 32768)
    | {"original_max_position_embeddings": 32768, "rope_theta": 500000, "sliding_window": None},
    "Phi-4-mini": PHI3
    | sizes(3072, 8192, 32, 24, 8, 200064, 131072)
    | {"rope_scaling": longrope(), "partial_rotary_factor": 0.75, "sliding_window": 262144}
    | {"tie_word_embeddings": True, "full_attn_mod": 1, "interpolate_factor": 1},
    "gemma-2-2b": GEMMA2 | sizes(2304, 9216, 26, 8, 4, 256000, 8192),
    "gemma-2-9b": GEMMA2 | sizes(3584, 14336, 42, 16, 8, 256000, 8192) | {"sliding_window_size": 4096},
    "gemma-2-27b": GEMMA2
    | sizes(4608, 36864, 46, 32, 16, 256000, 8192)
    | {"head_dim": 128, "query_pre_attn_scalar": 144},
    "gemma-3-270m": GEMMA3
    | sizes(640, 2048, 18, 4, 1, 262144, 32768)
    | {"_sliding_window_pattern": 6, "use_bidirectional_attention": False}
    | {"layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3},
    "gemma-3-1b": GEMMA3 | sizes(1152, 6912, 26, 4, 1, 262144, 32768) | {"sliding_window_pattern": 6},
}
