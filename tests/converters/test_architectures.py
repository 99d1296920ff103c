"""Every architecture as emitted, in float32, against transformers' own modelling code on the same seeded weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from edgekit.config import ModelConfig
from edgekit.converters.architectures.fields import ConfigFields
from edgekit.errors import SourceError

WINDOW = 24  # shorter than the prompt: the sequence runs past it
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# The growth is strong, so that it shows within 110 tokens; in the second it starts where the context ends.
MINISTRAL3_ROPE = YARN | {"original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.5}
SHORT_MINISTRAL3_ROPE = MINISTRAL3_ROPE | {
    "original_max_position_embeddings": 256,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [1.5 + 0.7 * index for index in range(8)],
}
PARTIAL_LONGROPE = {
    "num_attention_heads": 6,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
        "long_factor": [1.5, 2.2, 2.9, 3.6, 4.3],
    },
}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-dynamic": ("llama", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "ministral": (
        "ministral",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "ministral3": ("ministral3", {"head_dim": 16, "rope_parameters": MINISTRAL3_ROPE}),
    "ministral3-20": ("ministral3", {"head_dim": 20, "rope_parameters": MINISTRAL3_ROPE}),
    "ministral3-short": ("ministral3", {"head_dim": 16, "rope_parameters": SHORT_MINISTRAL3_ROPE}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5, "head_dim": 32, "num_attention_heads": 2}),
    "phi3-longrope-short": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
    ),
    "phi3-longrope-long": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": GEMMA3_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    # Heads that ONNX Runtime's attention does not rotate (no multiple of 16) or does not take (no multiple of 8).
    "llama-120": ("llama", {"head_dim": 120, **HEADS}),
    "llama-100": ("llama", {"head_dim": 100, **HEADS}),
    "llama-12-llama3": ("llama", {"head_dim": 12, "rope_parameters": LLAMA3}),
    "llama-20-yarn": ("llama", {"head_dim": 20, "rope_parameters": YARN}),
    "llama-6-linear": ("llama", {"head_dim": 6, "rope_parameters": LINEAR}),
    "mistral-120": ("mistral", {"head_dim": 120, "sliding_window": WINDOW, **HEADS}),
    "mistral-20": ("mistral", {"head_dim": 20, "sliding_window": WINDOW}),
    "qwen2-20": ("qwen2", {"hidden_size": 80}),
    "qwen3-20": ("qwen3", {"head_dim": 20}),
    "phi3-partial-20": ("phi3", {"hidden_size": 80, "partial_rotary_factor": 0.5, "sliding_window": WINDOW}),
    "phi3-longrope-14": ("phi3", {"hidden_size": 84, **PARTIAL_LONGROPE, "original_max_position_embeddings": 128}),
    "phi3-longrope-14-long": ("phi3", {"hidden_size": 84, **PARTIAL_LONGROPE, "original_max_position_embeddings": 32}),
    "gemma2-20": ("gemma2", {"head_dim": 20, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}),
    "smollm3-20": ("smollm3", {"hidden_size": 80, "no_rope_layers": [1, 0, 1]}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tiny_model: Any, check_logits: Any, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    directory = tiny_model(model_type, **changes)
    check_logits(directory, directory, tmp_path, chunks=(70, 16))


# ---- Keys that a config leaves out ----

SMALL = {"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 32, "vocab_size": 99}
MODULES = {"gemma3_text": "gemma3"}
FAMILIES = ["llama", "mistral", "ministral", "ministral3", "phi3", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3_text"]
DEFAULTED = [
    "attn_logit_softcapping",
    "attention_bias",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
]


def module_of(model_type: str) -> Any:
    return importlib.import_module(f"edgekit.converters.architectures.{MODULES.get(model_type, model_type)}")


def described(values: dict[str, Any]) -> ModelConfig:
    result: ModelConfig = module_of(values["model_type"]).describe(ConfigFields(values, "config.json"))
    return result


def full_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """Every value spelled out, as transformers' config class fills them in."""
    from transformers import AutoConfig

    values: dict[str, Any] = AutoConfig.for_model(model_type, **SMALL, **changes).to_dict()
    return values


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_key_is_read_as_transformers_reads_it(model_type: str) -> None:
    full = full_config(model_type)
    assert set(module_of(model_type).DEFAULTS) <= set(full)
    dropped = [key for key in DEFAULTED if key in full]
    expected = described(full)
    for key in dropped:
        assert described({name: value for name, value in full.items() if name != key}) == expected, key
    assert described({name: value for name, value in full.items() if name not in dropped}) == expected


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_window_that_is_on_has_a_default_width(model_type: str) -> None:
    full = full_config(model_type, use_sliding_window=True)
    assert {layer.window for layer in described(full).layers} == {0, 4096}
    assert described({name: value for name, value in full.items() if name != "sliding_window"}) == described(full)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scaling_added_to_a_config_of_transformers_5_counts(model_type: str) -> None:
    """Model cards say to add `rope_scaling`; a config saved by transformers 5 already has `rope_parameters`."""
    if model_type == "phi3":
        pytest.skip("its config class takes no linear scaling")
    full = full_config(model_type)
    added = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    if model_type == "ministral3":
        added["rope_scaling"] |= {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
    found = described(full | added)
    assert found == described(full_config(model_type, **added))
    assert found != described(full)


def test_null_is_no_default() -> None:
    full = full_config("mistral", sliding_window=None)
    assert {layer.window for layer in described(full).layers} == {0}
    assert described(full | {"num_key_value_heads": None}).attention.kv_heads == SMALL["num_attention_heads"]
    with pytest.raises(SourceError, match="hidden_activation"):
        described(full_config("gemma2") | {"hidden_activation": None})
