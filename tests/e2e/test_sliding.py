"""Models whose every layer has a sliding window go on past their context: the cache lets go of what no layer sees."""

from __future__ import annotations

from typing import Any

import pytest

import edgekit

WINDOW, CONTEXT, TRAINED = 12, 32, 256
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [1.5 + 0.7 * index for index in range(8)],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3 across its switch": (
        "phi3",
        {"sliding_window": WINDOW, "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    ),
}


@pytest.fixture(params=MODELS)
def sliding(request: pytest.FixtureRequest, converted: Any, tiny_model: Any) -> Any:
    """A model of a context of 32, and its source."""
    model_type, config = MODELS[request.param]
    bundle = converted(model_type, context=CONTEXT, **config)
    with edgekit.load(bundle, threads=2, session_cache_bytes=0) as model:
        model.end_tokens = frozenset()
        yield model, tiny_model(model_type, **config)


@pytest.mark.parametrize("prompt", ["hello", "x" * (CONTEXT - 1), "a prompt that is longer than the context " * 3])
def test_tokens_past_the_context_are_those_of_transformers(prompt: str, sliding: Any, transformers_greedy: Any) -> None:
    model, source = sliding
    count = 100
    expected = transformers_greedy(source, model.token_ids(prompt, add_special_tokens=True), count)
    reply = model.generate(prompt, raw=True, max_tokens=count, context_policy="sliding", speculate=False)
    assert list(reply.tokens)[: len(expected)] == expected
    assert reply.stats.dropped_tokens >= len(prompt) + len(expected) - 1 - CONTEXT > 0
