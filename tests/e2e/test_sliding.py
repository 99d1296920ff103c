"""Models whose every layer has a sliding window go on past their context: the cache lets go of what no layer sees."""

from __future__ import annotations

from typing import Any

import pytest

import edgekit
from edgekit.runtimes.backend_onnxruntime import OnnxRuntimeDecoder

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


@pytest.fixture
def mistral(converted: Any) -> Any:
    model_type, config = MODELS["mistral"]
    with edgekit.load(converted(model_type, context=CONTEXT, **config), threads=1, session_cache_bytes=0) as model:
        model.end_tokens = frozenset()
        yield model


OPTIONS: dict[str, Any] = {"raw": True, "context_policy": "sliding"}


def test_the_cache_stays_within_the_context(mistral: Any) -> None:
    session = mistral.session()
    session.generate("hello", max_tokens=150, **OPTIONS)
    assert len(session.tokens) == len("hello") + 149
    assert session._sequence.cache_bytes <= mistral.program.graph.cache.token_bytes * CONTEXT


def test_next_turn_computes_only_what_is_new(mistral: Any) -> None:
    session, prompt = mistral.session(), "a prompt that is longer than the context"
    first = session.generate(prompt, max_tokens=4, **OPTIONS)
    second = session.generate(prompt + " and goes on", max_tokens=20, **OPTIONS)
    assert (first.stats.cached_tokens, second.stats.cached_tokens) == (0, len(prompt))
    assert second.tokens == mistral.generate(prompt + " and goes on", max_tokens=20, **OPTIONS).tokens


def test_what_left_the_cache_is_computed_again_where_it_is_needed(mistral: Any) -> None:
    session = mistral.session()
    session.generate("hello" * 20, max_tokens=4, **OPTIONS)
    with pytest.raises(edgekit.GenerationError, match="let go"):
        session.rewind(50)
    reply = session.generate("hello" * 10, max_tokens=20, **OPTIONS)
    assert reply.stats.cached_tokens == 0
    assert reply.tokens == mistral.generate("hello" * 10, max_tokens=20, **OPTIONS).tokens
    session.rewind(0)
    assert session.generate("hello", raw=True, max_tokens=5).stats.dropped_tokens == 0


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_it_ends_at_the_trained_length(over: int, mistral: Any) -> None:
    prompt = "x" * (TRAINED - 1 + over)
    if over > 0:
        with pytest.raises(edgekit.GenerationError, match=f"is {TRAINED} tokens.* 1 too many"):
            mistral.generate(prompt, **OPTIONS)
        return
    reply = mistral.generate(prompt, **OPTIONS)
    assert (reply.finish_reason, reply.stats.new_tokens) == ("length", 1 - over)


def test_drafts_change_nothing(mistral: Any) -> None:
    plain = mistral.generate("ab" * 10, max_tokens=100, speculate=False, **OPTIONS)
    drafted = mistral.generate("ab" * 10, max_tokens=100, **OPTIONS)
    assert drafted.tokens == plain.tokens


def test_saved_and_forked_sessions_slide_on(mistral: Any, tmp_path: Any) -> None:
    session, prompt = mistral.session(), "hello" * 9
    session.generate(prompt, max_tokens=4, **OPTIONS)
    session.save(tmp_path / "saved")
    others = [session.fork(), mistral.restore(tmp_path / "saved"), session]
    replies = [other.generate(prompt + ", go on", max_tokens=60, **OPTIONS) for other in others]
    assert len({reply.tokens for reply in replies}) == 1
    assert all(reply.stats.cached_tokens == len(prompt) for reply in replies)


def test_window_as_long_as_the_context_is_refused(converted: Any) -> None:
    model_type, config = MODELS["mistral"]
    bundle = converted(model_type, context=WINDOW, **config)
    with edgekit.load(bundle, threads=1) as model, pytest.raises(edgekit.GenerationError, match="window of 12"):
        model.stream("hi", context_policy="sliding")


def test_context_of_the_trained_length_ends_there(converted: Any) -> None:
    """Nothing has to leave the cache: the policy is one without effect."""
    model_type, config = MODELS["mistral"]
    with edgekit.load(converted(model_type, **config), threads=1) as model:
        model.end_tokens = frozenset()
        reply = model.generate("hello", **OPTIONS)
    assert (reply.finish_reason, reply.stats.dropped_tokens) == ("length", 0)
    assert reply.stats.new_tokens == TRAINED - len("hello")


def test_interrupt_as_the_cache_slides(mistral: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forget = OnnxRuntimeDecoder.forget

    def interrupted(self: OnnxRuntimeDecoder, count: int) -> None:
        forget(self, count)
        raise KeyboardInterrupt

    session, prompt = mistral.session(), "hello" * 5
    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeDecoder, "forget", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.generate(prompt, max_tokens=60, **OPTIONS)
    assert session.fork().tokens == ()
    again = session.generate(prompt, max_tokens=60, **OPTIONS)
    assert again.tokens == mistral.generate(prompt, max_tokens=60, **OPTIONS).tokens
