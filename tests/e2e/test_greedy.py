"""Greedy tokens of a full-precision bundle are those of transformers' generate(), token for token."""

from __future__ import annotations

from typing import Any

import pytest

import edgekit

COUNT = 40
WINDOW = 24
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [1.5 + 0.7 * index for index in range(8)],
}
FEW_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3 past its window": (
        "gemma3_text",
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "llama with heads of 120": ("llama", {"head_dim": 120, **FEW_HEADS}),
    "llama with heads of 100": ("llama", {"head_dim": 100, **FEW_HEADS}),
    "mistral with heads of 20, past its window": ("mistral", {"head_dim": 20, "sliding_window": WINDOW}),
    "phi3 that rotates 10 of 20": ("phi3", {"hidden_size": 80, "partial_rotary_factor": 0.5}),
    "phi3 before its switch": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    "phi3 past its switch": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8}),
    "phi3 across its switch": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
}
PROMPTS = ("The lighthouse", "1, 2, 3, ")


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(
    case: str, converted: Any, tiny_model: Any, transformers_greedy: Any
) -> None:
    model_type, config = CASES[case]
    with edgekit.load(converted(model_type, **config), threads=2) as model:
        for prompt in PROMPTS:
            expected = transformers_greedy(
                tiny_model(model_type, **config), list(model.tokenizer.encode(prompt).ids), COUNT
            )
            found = model.generate(prompt, raw=True, max_tokens=COUNT)
            assert list(found.tokens) == expected


def test_switching_rotation_is_seen(converted: Any) -> None:
    """The case above would prove nothing if both sets of factors gave the same tokens."""
    model_type, config = CASES["phi3 across its switch"]
    never = config | {"rope_parameters": LONGROPE | {"long_factor": LONGROPE["short_factor"]}}
    tokens = []
    for case in (config, never):
        with edgekit.load(converted(model_type, **case), threads=2) as model:
            tokens.append(model.generate(PROMPTS[0], raw=True, max_tokens=COUNT).tokens)
    before = 32 - len(PROMPTS[0])
    assert tokens[0][:before] == tokens[1][:before]
    assert tokens[0] != tokens[1]


def test_second_turn_across_the_switch_is_that_of_a_fresh_session(converted: Any) -> None:
    model_type, config = CASES["phi3 across its switch"]
    with edgekit.load(converted(model_type, **config), threads=2) as model:
        session = model.session()
        session.generate("ab", raw=True, max_tokens=4)
        long = session.generate("ab" * 20, raw=True, max_tokens=4)
        short = session.generate("ab", raw=True, max_tokens=4)
        assert long.tokens == model.generate("ab" * 20, raw=True, max_tokens=4).tokens
        assert short.tokens == model.generate("ab", raw=True, max_tokens=4).tokens
