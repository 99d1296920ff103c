"""What one session has computed, others need not: prefixes shared between open sessions and with closed ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import edgekit
from edgekit.runtimes.backend_onnxruntime import OnnxRuntimeDecoder
from edgekit.runtimes.engine import LoadedModel

SYSTEM = "You are a lighthouse keeper who answers in rhymes."
CONTEXT = 256


@pytest.fixture
def model(converted: Any) -> Iterator[LoadedModel]:
    with edgekit.load(converted("llama"), threads=2) as loaded:
        yield loaded


@pytest.fixture
def fresh(llama: LoadedModel) -> LoadedModel:
    """The same model, which shares nothing."""
    return llama


def ask(model: Any, question: str, **options: Any) -> edgekit.Reply:
    reply: edgekit.Reply = model.generate(question, system=SYSTEM, max_tokens=8, **options)
    return reply


def test_system_prompt_is_computed_once(model: LoadedModel, fresh: LoadedModel) -> None:
    first, second = ask(model, "Why?"), ask(model, "How so?")
    shared = len(model.token_ids(f"<|system|>{SYSTEM}<|end|><|user|>", add_special_tokens=False))
    assert (first.stats.cached_tokens, second.stats.cached_tokens) == (0, shared)
    assert second.tokens == ask(fresh, "How so?").tokens


def test_open_session_shares_too(model: LoadedModel, fresh: LoadedModel) -> None:
    first, second = model.session(), model.session()
    ask(first, "Why?")
    before = first.tokens
    assert ask(second, "How so?").stats.cached_tokens > len(SYSTEM)
    assert first.tokens == before
    assert ask(first, "And then?").tokens == ask(fresh, "And then?").tokens


def test_conversation_goes_on_where_a_closed_session_ended(model: LoadedModel) -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Why?"}]
    first = model.generate(messages, max_tokens=8)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Go on"}]
    kept = model.store.kept_bytes
    second = model.generate(messages, max_tokens=8)
    assert second.stats.cached_tokens >= first.stats.prompt_tokens
    assert model.store.kept_bytes == kept, "the cache changed hands, and was not copied"


def test_cached_prompt_gives_the_same_logits_to_the_bit(converted: Any) -> None:
    """Rows computed together round alike, however many they are: so a seed gives the same tokens, cached or not."""
    for quant in ("fp32", "int8", "int4"):
        with edgekit.load(converted("llama", quant=quant), threads=2) as model:
            options: dict[str, Any] = {"temperature": 1.0, "seed": 5, "logprobs": 5}
            first, second = ask(model, "Why?", **options), ask(model, "Why?", **options)
            assert second.stats.cached_tokens == second.stats.prompt_tokens - 2
            assert second.logprobs == first.logprobs, quant


def test_short_prefixes_are_not_looked_for(model: LoadedModel) -> None:
    model.generate("hello", raw=True, max_tokens=8)
    assert model.generate("hello", raw=True, max_tokens=8).stats.cached_tokens == 0


def test_zero_keeps_and_shares_nothing(fresh: LoadedModel) -> None:
    session = fresh.session()
    ask(session, "Why?")
    assert ask(fresh, "Why?").stats.cached_tokens == 0
    assert fresh.store.kept_bytes == 0


def test_least_recently_used_go_first(converted: Any) -> None:
    token_bytes = 3 * 2 * 2 * 16 * 4
    with edgekit.load(converted("llama"), threads=1, session_cache_bytes=2 * 256 * token_bytes) as model:
        one, two, three = ("first " * 12, "second " * 12, "third " * 12)

        def cached(text: str) -> int:
            return model.generate(text, raw=True, max_tokens=1).stats.cached_tokens

        assert [cached(one), cached(two)] == [0, 0]
        assert cached(one) == len(one) - 2
        assert cached(three) == 0
        assert model.store.kept_bytes <= 2 * 256 * token_bytes
        assert cached(one) == len(one) - 2
        assert cached(two) == 0, "the least recently used went when the third came"


def test_open_sessions_count_but_never_go(model: LoadedModel) -> None:
    """The default budget is one whole context: what an open session takes, closed ones can't."""
    ask(model, "Why?")
    assert model.store.kept_bytes > 0
    session = model.session()
    session.generate("x" * (CONTEXT // 2), raw=True, max_tokens=1)
    assert model.store.kept_bytes == 0
    assert session.tokens


def test_garbage_is_not_shared(model: LoadedModel) -> None:
    session = model.session()
    ask(session, "Why?")
    del session
    assert ask(model, "Why?").stats.cached_tokens == 0


def test_negative_budget_is_refused(converted: Any) -> None:
    with pytest.raises(edgekit.GenerationError, match="session_cache_bytes is -1"):
        edgekit.load(converted("llama"), session_cache_bytes=-1)


def test_many_threads_share_one_prefix(model: LoadedModel, fresh: LoadedModel) -> None:
    questions = [f"Question {number}?" for number in range(12)]
    expected = [ask(fresh, question).tokens for question in questions]
    found: dict[int, tuple[int, ...]] = {}
    errors: list[BaseException] = []

    def work(start: int) -> None:
        try:
            for place in range(start, len(questions), 4):
                found[place] = ask(model, questions[place]).tokens
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [found[place] for place in range(len(questions))] == expected


def test_long_rotation_is_not_shared_with_short(long_rope_bundle: Path) -> None:
    with (
        edgekit.load(long_rope_bundle, threads=1) as model,
        edgekit.load(long_rope_bundle, threads=1, session_cache_bytes=0) as fresh,
    ):
        model.generate("ab" * 12, raw=True, max_tokens=2)
        reply = model.generate("ab" * 20, raw=True, max_tokens=4)
        assert reply.stats.cached_tokens == 0
        assert reply.tokens == fresh.generate("ab" * 20, raw=True, max_tokens=4).tokens
        assert model.generate("ab" * 22, raw=True, max_tokens=4).stats.cached_tokens == 40


def test_cache_may_grow_while_its_size_is_asked_for(llama: LoadedModel) -> None:
    decoder = llama.backend.decoder()
    assert isinstance(decoder, OnnxRuntimeDecoder)
    cache = decoder._cache

    class Growing:
        @property
        def nbytes(self) -> int:
            cache[f"more {len(cache)}"] = np.zeros(1, np.float32)
            return 8

    cache["a"] = cast(Any, Growing())
    assert decoder.cache_bytes == 8
