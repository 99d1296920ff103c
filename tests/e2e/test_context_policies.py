"""Context policies over a real backend: refused, turns left out, or a cache that slides; the stats say which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgekit
from edgekit.runtimes.engine import LoadedModel

CONTEXT = 64
MARKS = 3  # the template's tokens around a message and before the reply: role and end of each, role of the reply


@pytest.fixture(scope="module")
def model(converted: Any) -> Iterator[LoadedModel]:
    with edgekit.load(converted("llama", context=CONTEXT), threads=1, session_cache_bytes=0) as loaded:
        loaded.end_tokens = frozenset()
        yield loaded


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize("policy", ["error", "drop-oldest-turns"])
def test_one_message_at_the_limit(over: int, policy: str, model: LoadedModel) -> None:
    prompt = "x" * (CONTEXT - 1 - MARKS + over)
    if over > 0:
        with pytest.raises(edgekit.GenerationError, match=f"is {CONTEXT} tokens.*: 1 too many"):
            model.generate([{"role": "user", "content": prompt}], context_policy=policy)
        return
    reply = model.generate([{"role": "user", "content": prompt}], context_policy=policy)
    assert (reply.finish_reason, reply.stats.new_tokens) == ("length", 1 - over)


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), max_tokens=st.integers(1, 30), system=st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_dropped_conversation_is_the_shorter_one(
    sizes: list[int], max_tokens: int, system: bool, model: LoadedModel
) -> None:
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": "x" * size} for place, size in enumerate(sizes)]
    if system:
        messages.insert(0, {"role": "system", "content": "s"})
    try:
        reply = model.generate(messages, max_tokens=max_tokens, context_policy="drop-oldest-turns")
    except edgekit.GenerationError:
        return  # the last turn is too long: what is refused, and when, is tested without a model
    dropped = reply.stats.dropped_messages
    assert not (system and 0 in dropped)
    kept = [message for place, message in enumerate(messages) if place not in dropped]
    shorter = model.generate(kept, max_tokens=max_tokens)
    assert (reply.tokens, reply.stats.prompt_tokens) == (shorter.tokens, shorter.stats.prompt_tokens)
    assert reply.stats.new_tokens == max_tokens or reply.finish_reason == "length"


def test_positions_do_not_count_the_system_option(model: LoadedModel) -> None:
    messages = [{"role": "user", "content": "x" * 20} for _ in range(4)]
    reply = model.generate(messages, max_tokens=1, system="short", context_policy="drop-oldest-turns")
    assert reply.stats.dropped_messages == (0, 1)


def test_next_turn_reuses_what_was_kept(model: LoadedModel) -> None:
    session, messages, reused = model.session(), list[Any](), 0
    for _ in range(12):
        messages.append({"role": "user", "content": "x" * 4})
        reply = session.generate(messages, max_tokens=1, context_policy="drop-oldest-turns")
        messages.append({"role": "assistant", "content": "yes"})
        reused += reply.stats.cached_tokens > 0
    assert reply.stats.dropped_messages
    assert reused >= 8


def test_sliding_is_refused_where_a_layer_sees_all(model: LoadedModel, converted: Any) -> None:
    with pytest.raises(edgekit.GenerationError, match="sliding window") as raised:
        model.stream("hi", context_policy="sliding")
    assert "drop-oldest-turns" in (raised.value.hint or "")
    config = {
        "head_dim": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    with (
        edgekit.load(converted("gemma3_text", context=CONTEXT, **config), threads=1) as mixed,
        pytest.raises(edgekit.GenerationError, match="sliding window"),
    ):
        mixed.stream("hi", context_policy="sliding")


def test_unknown_policy_is_refused(model: LoadedModel) -> None:
    with pytest.raises(edgekit.GenerationError, match="context_policy is 'forget'"):
        model.stream("hi", context_policy="forget")
