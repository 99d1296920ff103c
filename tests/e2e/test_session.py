"""Sessions over a real backend: reuse of the cache, ends of a reply, limits of the context."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import edgekit
from edgekit.runtimes import sequence
from edgekit.runtimes.backend_onnxruntime import OnnxRuntimeDecoder

CONTEXT = 32


@pytest.fixture
def short_llama(converted: Any) -> Any:
    with edgekit.load(converted("llama", context=CONTEXT), threads=2) as model:
        yield model


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward pass since the test began."""
    counts: list[int] = []
    forward = OnnxRuntimeDecoder.forward

    def counted(self: OnnxRuntimeDecoder, tokens: Any, **options: Any) -> Any:
        counts.append(len(tokens))
        return forward(self, tokens, **options)

    monkeypatch.setattr(OnnxRuntimeDecoder, "forward", counted)
    return counts


def test_no_token_is_computed_twice(llama: Any, computed: list[int]) -> None:
    reply = llama.generate("hello there", raw=True, max_tokens=10)
    assert computed == [11] + [1] * 9
    assert (reply.stats.prompt_tokens, reply.stats.cached_tokens, reply.stats.new_tokens) == (11, 0, 10)


def test_long_prompt_is_computed_in_chunks(llama: Any, computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = llama.generate("hello there", raw=True, max_tokens=3).tokens
    computed.clear()
    monkeypatch.setattr(sequence, "PREFILL_CHUNK", 4)
    assert llama.generate("hello there", raw=True, max_tokens=3).tokens == whole
    assert computed == [4, 4, 3, 1, 1]


def test_cached_prefix_is_not_computed_again(llama: Any, computed: list[int]) -> None:
    session = llama.session()
    first = session.generate("hello there", raw=True, max_tokens=1)
    computed.clear()
    second = session.generate("hello there, you", raw=True, max_tokens=1)
    assert (first.stats.cached_tokens, second.stats.cached_tokens) == (0, 11)
    assert computed == [5]
    assert session.generate("hello there, you", raw=True, max_tokens=1).stats.cached_tokens == 14
    assert computed == [5, 2]


def test_second_turn_is_that_of_a_fresh_session(llama: Any) -> None:
    session, messages = llama.session(), [{"role": "user", "content": "hello"}]
    first = session.generate(messages, max_tokens=8)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "go on"}]
    second = session.generate(messages, max_tokens=8)
    assert second.stats.cached_tokens >= first.stats.prompt_tokens
    assert second.tokens == llama.generate(messages, max_tokens=8).tokens


def test_other_prompt_forgets_the_last_one(llama: Any) -> None:
    session = llama.session()
    for prompt in ("hello", "hold on", "", "hello", "h"):
        fresh = llama.generate(prompt, max_tokens=6)
        assert session.generate(prompt, max_tokens=6).tokens == fresh.tokens


def test_cache_grows_past_its_first_buffers(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = llama.generate("hello", max_tokens=100).tokens
    monkeypatch.setattr("edgekit.runtimes.backend_onnxruntime.FIRST_CAPACITY", 8)
    assert llama.generate("hello", max_tokens=100).tokens == whole


def test_sessions_do_not_disturb_each_other(llama: Any) -> None:
    prompts = ["hello", "other words", "and more", "x" * 40]
    alone = [llama.generate(prompt, max_tokens=20).tokens for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: llama.generate(prompt, max_tokens=20).tokens, prompts))
    assert together == alone


def test_interleaved_streams_do_not_disturb_each_other(llama: Any) -> None:
    prompts = ("hello", "other words")
    streams = [llama.stream(prompt, max_tokens=20) for prompt in prompts]
    tokens: list[tuple[int, ...]] = [(), ()]
    for pair in zip(*streams, strict=False):
        tokens = [so_far + chunk.tokens for so_far, chunk in zip(tokens, pair, strict=True)]
    for prompt, found in zip(prompts, tokens, strict=True):
        assert found == llama.generate(prompt, max_tokens=20).tokens[: len(found)]


def test_stream_put_together_is_the_reply(llama: Any) -> None:
    chunks = list(llama.stream("hello", max_tokens=50))
    reply = llama.generate("hello", max_tokens=50)
    assert "".join(chunk.text for chunk in chunks) == reply.text == llama.tokenizer.decode(reply.tokens)
    assert sum((chunk.tokens for chunk in chunks), ()) == reply.tokens
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1].stats is not None


def test_end_token_ends_the_reply_and_is_no_part_of_it(llama: Any) -> None:
    tokens = llama.generate("hello", max_tokens=20).tokens
    end = next(token for token in tokens[2:] if tokens.index(token) >= 2)
    llama.end_tokens = frozenset({end})
    reply = llama.generate("hello", max_tokens=20)
    assert (reply.finish_reason, reply.tokens) == ("stop", tokens[: tokens.index(end)])


def test_stop_text_may_span_tokens(llama: Any) -> None:
    text = llama.generate("hello", max_tokens=60).text
    stop = next(text[at : at + 3] for at in range(len(text)) if len(text[at : at + 3].encode("ascii", "ignore")) == 3)
    reply = llama.generate("hello", max_tokens=60, stop=("not there", stop))
    chunks = list(llama.stream("hello", max_tokens=60, stop=[stop]))
    assert reply.finish_reason == "stop"
    assert reply.text == "".join(chunk.text for chunk in chunks) == text[: text.index(stop)]
    assert llama.generate("hello", max_tokens=60, stop=stop).tokens == reply.tokens


def test_cancel_from_another_thread_ends_the_stream(llama: Any) -> None:
    session = llama.session()
    stream = session.stream("hello", max_tokens=200)
    first = next(stream)
    thread = threading.Thread(target=session.cancel)
    thread.start()
    thread.join()
    rest = list(stream)
    assert rest[-1].finish_reason == "cancelled"
    assert rest[-1].stats.new_tokens == len(first.tokens) + sum(len(chunk.tokens) for chunk in rest) < 200
    again = session.generate("hello", max_tokens=5)
    assert again.tokens == llama.generate("hello", max_tokens=5).tokens


def test_cancel_during_the_prompt_ends_it_between_chunks(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "PREFILL_CHUNK", 4)
    session, forward = llama.session(), OnnxRuntimeDecoder.forward

    def cancelling(self: OnnxRuntimeDecoder, tokens: Any, **options: Any) -> Any:
        session.cancel()
        return forward(self, tokens, **options)

    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeDecoder, "forward", cancelling)
        reply = session.generate("hello there", max_tokens=5)
    assert (reply.finish_reason, reply.text, reply.tokens) == ("cancelled", "", ())
    assert session.generate("hello there", max_tokens=5).stats.cached_tokens == 4


@pytest.mark.parametrize(("length", "new"), [(CONTEXT - 1, 1), (CONTEXT - 2, 2), (1, CONTEXT - 1)])
def test_reply_ends_where_the_context_does(length: int, new: int, short_llama: Any) -> None:
    short_llama.end_tokens = frozenset()
    reply = short_llama.generate("x" * length, raw=True, max_tokens=1000)
    assert (reply.finish_reason, len(reply.tokens)) == ("length", new)
    assert short_llama.generate("x" * length, raw=True).tokens == reply.tokens


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 10 * CONTEXT])
def test_prompt_without_room_for_a_token_is_refused(length: int, short_llama: Any) -> None:
    with pytest.raises(edgekit.GenerationError, match=f"is {length} tokens, the context of 32 has room for 31"):
        short_llama.generate("x" * length, raw=True)


def test_prompt_is_checked_before_the_first_chunk_is_asked_for(short_llama: Any) -> None:
    with pytest.raises(edgekit.GenerationError):
        short_llama.stream("x" * 100)
    with pytest.raises(edgekit.GenerationError, match="max_tokens is 0"):
        short_llama.stream("x", max_tokens=0)


def test_sampling_with_a_seed_is_repeatable_in_any_session(llama: Any) -> None:
    options = {"temperature": 1.0, "top_k": 50, "seed": 3, "max_tokens": 20}
    session = llama.session()
    assert session.generate("hello", **options).tokens == session.generate("hello", **options).tokens
    assert session.generate("hello", **options).tokens == llama.generate("hello", **options).tokens
