"""Every architecture as emitted, in float32, against transformers' own modelling code on the same seeded weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from edgekit.config import ModelConfig
from edgekit.converters.architectures.fields import ConfigFields
from edgekit.errors import SourceError


def test_logits_equal_transformers(architecture: Any, tiny_model: Any, check_logits: Any, tmp_path: Path) -> None:
    model_type, changes = architecture
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
