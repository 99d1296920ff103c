"""What models cost, by their configs: against transformers' own models and caches, and against published totals."""

from __future__ import annotations

import re
from collections import Counter
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from edgekit.anatomy import Anatomy, LayerCache, anatomy_of
from edgekit.converters.anatomies.families import DESCRIBED, describe
from edgekit.converters.architectures.fields import ConfigFields
from edgekit.errors import EdgeKitError, SourceError, UnsupportedError
from edgekit.registry import ARCHITECTURES, load_attribute

Values = dict[str, Any]
# What transformers' defaults lack to make a model; the sizes are those of published ones.
COMPLETED: dict[str, Values] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "glm4_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"num_key_value_heads": 8, "head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
}
# A checkpoint's own name for a layout that transformers loads under another.
SAME_LAYOUT = {"kimi_k2": "deepseek_v3"}


def config_of(model_type: str, **changes: Any) -> Any:
    values = COMPLETED.get(model_type, {}) | changes
    return AutoConfig.for_model(SAME_LAYOUT.get(model_type, model_type), **values).get_text_config()


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def anatomy(values: Values) -> Anatomy:
    return describe(ConfigFields(values, "config.json"))


def kind_in_transformers(name: str, shape: tuple[int, ...]) -> str:
    """The class that a parameter of transformers belongs to, by its name."""
    rules = {
        r"bias$|A_log$|router|shared_expert_gate|\.gate\.weight$|conv1d|\.conv\.conv\.|altup|laurel|per_layer_": "other",
        r"embed_tokens": "embedding",
        r"lm_head": "head",
        r"\.experts\.": "experts",
        r"self_attn|linear_attn|mamba|\.conv\.": "attention",
        r"mlp|feed_forward|shared_": "feed_forward",
    }
    if len(shape) == 1:
        return "other"
    if "embed_tokens_per_layer" in name:
        return "embedding"
    return next((kind for pattern, kind in rules.items() if re.search(pattern, name)), "other")


@pytest.mark.parametrize("model_type", sorted(DESCRIBED))
def test_parameters_of_each_class_are_those_of_transformers(model_type: str) -> None:
    config = config_of(model_type)
    expected: Counter[str] = Counter()
    for name, parameter in on_meta(config).named_parameters():
        expected[kind_in_transformers(name, tuple(parameter.shape))] += parameter.numel()
    found = anatomy({**config.to_dict(), "model_type": model_type})
    assert {kind: count for kind, count in found.parameters_by_kind().items() if count} == dict(expected)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_models_that_are_converted_have_the_anatomy_of_their_description(model_type: str) -> None:
    changes = {"pad_token_id": 0} if model_type == "phi3" else {}
    config = config_of(model_type, **changes)
    described = load_attribute(ARCHITECTURES[model_type]).describe(ConfigFields(config.to_dict(), "config.json"))
    assert anatomy_of(described).parameters == sum(parameter.numel() for parameter in on_meta(config).parameters())


SIZES: Values = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TINY: dict[str, Values] = {
    "gpt_oss": {"num_hidden_layers": 2, "head_dim": 16, "sliding_window": 8, "num_local_experts": 4},
    "gemma3n_text": {
        "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 8, "num_kv_shared_layers": 2, "intermediate_size": 96,
        "layer_types": ["sliding_attention", "full_attention"] * 3, "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 6,
    },
    "gemma4_text": {
        "num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3, "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8,
        "mamba_d_head": 16, "mamba_d_state": 16, "num_local_experts": 4, "shared_intermediate_size": 64,
    },
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "qwen3_moe": {
        "num_hidden_layers": 2, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
    "qwen3_next": {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
}  # fmt: skip


def held(layer: Any) -> int:
    """Elements that a layer of transformers' cache holds."""
    tensors = [getattr(layer, name, None) for name in ("keys", "values", "conv_states", "recurrent_states")]
    flat = [part for found in tensors for part in (found.values() if isinstance(found, dict) else [found])]
    return sum(part.numel() for part in flat if part is not None)


def needed(cache: LayerCache, tokens: int) -> int:
    return cache.per_token * cache.tokens(tokens) + cache.state


@pytest.mark.parametrize("model_type", sorted(TINY))
@pytest.mark.parametrize("tokens", [5, 20])
def test_caches_are_as_large_as_those_of_transformers(model_type: str, tokens: int) -> None:
    config = config_of(model_type, **(SIZES | TINY[model_type]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        for token in range(tokens):
            model(torch.tensor([[token + 3]]), past_key_values=cache, use_cache=True)
    found = anatomy(config.to_dict()).caches
    expected = [held(layer) for layer in cache.layers]
    for layer, size in zip(found, expected, strict=True):
        # transformers drops the token that leaves the window one step earlier
        kept = min(tokens, layer.window - 1) if layer.window else tokens
        assert size == layer.per_token * kept + layer.state, layer
        assert needed(layer, tokens) - size in (0, layer.per_token)


def test_latent_cache_is_as_small_as_published() -> None:
    """70.272 kB a token in 16 bits: table 1 of "Insights into DeepSeek-V3" (arXiv:2505.09343)."""
    found = anatomy(config_of("deepseek_v3").to_dict())
    assert {layer.kind for layer in found.caches} == {"latent"}
    assert 2 * sum(layer.per_token for layer in found.caches) == 70_272


# ---- Published sizes: billions in all, and active ----

MOE = {"num_experts_per_tok": 8, "norm_topk_prob": True}
PUBLISHED: list[tuple[str, Values, float, float]] = [
    ("deepseek_v3", {}, 671, 37),
    ("kimi_k2", {"num_attention_heads": 64, "n_routed_experts": 384, "first_k_dense_replace": 1, "vocab_size": 163_840},
     1026, 32),
    ("deepseek_v2", {"vocab_size": 102_400, "hidden_size": 2048, "intermediate_size": 10_944, "num_hidden_layers": 27,
     "num_attention_heads": 16, "q_lora_rank": None, "moe_intermediate_size": 1408, "first_k_dense_replace": 1}, 15.7, 2.4),
    ("gpt_oss", {}, 117, 5.1),
    ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}, 20.9, 3.6),
    ("qwen3_moe", {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "head_dim": 128,
     "moe_intermediate_size": 1536}, 235, 22),
    ("qwen3_moe", {"num_hidden_layers": 48, "head_dim": 128}, 30.5, 3.3),
    ("qwen3_next", {}, 80, 3),
    ("mixtral", {}, 46.7, 12.9),
    ("phimoe", {"attention_bias": True, "lm_head_bias": True}, 41.9, 6.6),
    ("olmoe", {"intermediate_size": 1024}, 6.92, 1.3),
    ("llama4_text", {}, 109, 17),
    ("glm4_moe", {"attention_bias": True}, 106, 12),
    ("minimax_m2", {}, 230, 10),
]  # fmt: skip
TOTAL_TOLERANCE = 0.03  # published figures are rounded, and some count a vision part
ACTIVE_TOLERANCE = 0.2  # publishers count embedding and head in or out


@pytest.mark.parametrize(("model_type", "changes", "total", "active"), PUBLISHED)
def test_parameters_are_those_that_publishers_name(
    model_type: str, changes: Values, total: float, active: float
) -> None:
    values = config_of(model_type, **changes).to_dict() | {"model_type": model_type}
    found = anatomy(values | {"q_lora_rank": changes.get("q_lora_rank", values.get("q_lora_rank"))})
    assert found.parameters / 1e9 == pytest.approx(total, rel=TOTAL_TOLERANCE)
    assert found.active_parameters / 1e9 == pytest.approx(active, rel=ACTIVE_TOLERANCE)


# ---- Keys that publishers write otherwise than transformers saves ----


@pytest.mark.parametrize(
    ("model_type", "remove", "add"),
    [
        ("qwen3_moe", ["num_local_experts", "num_experts"], {"num_experts": 128}),
        ("qwen3_next", ["layer_types"], {"full_attention_interval": 4}),
        ("gpt_oss", ["layer_types"], {}),
        ("llama4_text", ["layer_types", "no_rope_layers", "moe_layers"], {}),
        ("lfm2", ["layer_types", "intermediate_size"], {"block_ff_dim": 12_288}),
        ("gemma4_text", ["per_layer_config"], {"global_head_dim": 512}),
        ("glm4_moe_lite", ["mlp_layer_types"], {"first_k_dense_replace": 1}),
        ("cohere2", ["layer_types"], {"sliding_window_pattern": 4}),
    ],
)
def test_published_spellings_mean_the_same(model_type: str, remove: list[str], add: Values) -> None:
    values = config_of(model_type).to_dict()
    spelled = {key: value for key, value in values.items() if key not in remove} | add
    assert anatomy(spelled) == anatomy(values)


# ---- What is not understood ----


def test_unknown_kind_of_layer_is_refused() -> None:
    values = config_of("qwen3_next").to_dict()
    with pytest.raises(UnsupportedError, match="layers of the kind 'diagonal_attention' are not known in a qwen3_next"):
        anatomy(values | {"layer_types": ["diagonal_attention"] * values["num_hidden_layers"]})


@pytest.mark.parametrize("model_type", sorted(DESCRIBED))
def test_broken_sizes_are_source_errors(model_type: str) -> None:
    values = config_of(model_type).to_dict() | {"model_type": model_type}
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        for wrong in (0, -1, "many", None, 1 << 40, [3], True):
            with pytest.raises(SourceError, match=key):
                anatomy(values | {key: wrong})


def test_parameters_are_the_shapes_products() -> None:
    found = anatomy(config_of("gpt_oss").to_dict())
    assert found.parameters == sum(prod(weight.shape) for weight in found.weights.values())
    assert sum(found.parameters_by_kind().values()) == found.parameters
    assert found.active_parameters < found.parameters


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 1 << 40), st.floats(), st.text(max_size=5),
    st.lists(st.one_of(st.integers(-1, 5), st.text(max_size=5), st.none()), max_size=5), st.dictionaries(st.text(), st.none()),
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(DESCRIBED)), st.data())
def test_spoilt_configs_are_described_or_refused(model_type: str, data: st.DataObject) -> None:
    values = config_of(model_type).to_dict() | {"model_type": model_type, "num_hidden_layers": 4}
    for key in data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3)):
        if key != "model_type":
            values[key] = data.draw(JUNK)
    try:
        found = anatomy(values)
    except EdgeKitError:
        return
    assert found.parameters > 0
    assert all(layer.per_token >= 0 <= layer.state for layer in found.caches)
