"""Sessions among threads: one stream at a time, cancel and close from anywhere, other threads run while the model computes."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.runtimes.backend_onnxruntime import OnnxRuntimeDecoder

IN_USE = pytest.raises(edgekit.GenerationError, match="the session is in use")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Events: a forward has begun, and may go on."""
    begun, go = threading.Event(), threading.Event()
    forward = OnnxRuntimeDecoder.forward

    def waiting(self: OnnxRuntimeDecoder, *arguments: Any, **options: Any) -> Any:
        begun.set()
        assert go.wait(60)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(OnnxRuntimeDecoder, "forward", waiting)
    yield begun, go
    go.set()


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A started thread, and what `work` returned or raised there."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_second_thread_is_refused(llama: Any, held: Any, tmp_path: Any) -> None:
    begun, go = held
    session = llama.session()
    thread, results = in_thread(lambda: session.generate("hello", max_tokens=8))
    assert begun.wait(60)
    for call in (
        lambda: session.generate("other"),
        lambda: session.generate_many("other", 2),
        session.fork,
        lambda: session.rewind(0),
        lambda: session.save(tmp_path / "a"),
    ):
        with IN_USE:
            call()
    go.set()
    thread.join()
    assert results[0].tokens == llama.generate("hello", max_tokens=8).tokens


def test_of_many_threads_one_has_the_session(llama: Any) -> None:
    session = llama.session()
    expected = llama.generate("hello", max_tokens=60).tokens
    started = threading.Barrier(8)

    def work() -> Any:
        started.wait()
        return session.generate("hello", max_tokens=60)

    running = [in_thread(work) for _ in range(8)]
    for thread, _ in running:
        thread.join()
    results = [result for _, (result,) in running]
    replies = [result for result in results if not isinstance(result, edgekit.GenerationError)]
    assert replies
    assert all(reply.tokens == expected for reply in replies)
    assert all("in use" in str(result) for result in results if result not in replies)


def test_stream_that_is_left_frees_the_session(llama: Any) -> None:
    session = llama.session()
    stream = session.stream("hello", max_tokens=50)
    next(stream)
    with IN_USE:
        session.stream("other")
    del stream
    assert session.generate("hello", max_tokens=5).tokens == llama.generate("hello", max_tokens=5).tokens


def test_stream_that_was_never_begun_holds_nothing(llama: Any) -> None:
    session = llama.session()
    streams = [session.stream("hello", max_tokens=5) for _ in range(2)]
    assert len(list(streams[1])) == len(list(streams[0])) > 0


def test_cancel_before_the_first_chunk_counts(llama: Any) -> None:
    session = llama.session()
    stream = session.stream("hello", max_tokens=5)
    session.cancel()
    assert [chunk.finish_reason for chunk in stream] == ["cancelled"]
    assert session.generate("hello", max_tokens=5).finish_reason != "cancelled"


def test_closing_ends_a_running_stream_as_cancelled(llama: Any, held: Any) -> None:
    begun, go = held
    session = llama.session()
    thread, results = in_thread(lambda: session.generate("hello", max_tokens=100))
    assert begun.wait(60)
    session.close()
    session.close()
    go.set()
    thread.join()
    assert results[0].finish_reason == "cancelled"
    assert session.tokens == ()
    with pytest.raises(edgekit.GenerationError, match="the session is closed"):
        session.generate("hello")


def test_closing_while_many_replies_are_made_frees_the_cache(llama: Any, held: Any) -> None:
    begun, go = held
    session = llama.session()
    decoder = session._sequence._decoder
    thread, results = in_thread(lambda: session.generate_many("hello", 3, max_tokens=100))
    assert begun.wait(60)
    session.close()
    assert not session._is_put_away, "it is still in use"
    go.set()
    thread.join()
    assert {reply.finish_reason for reply in results[0]} == {"cancelled"}
    assert session._is_put_away
    assert not decoder.cache_bytes


def test_closing_between_chunks_ends_the_stream(llama: Any) -> None:
    session = llama.session()
    stream = session.stream("hello", max_tokens=100)
    next(stream)
    session.close()
    assert [chunk.finish_reason for chunk in stream] == ["cancelled"]
    with pytest.raises(edgekit.GenerationError, match="closed"):
        session.fork()


def test_steps_show_every_forward(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.runtimes.sequence.PREFILL_CHUNK", 4)
    session = llama.session()
    steps = list(session.steps("hello there", max_tokens=6, speculate=False))
    chunks = [step for step in steps if step is not None]
    assert steps[:3] == [None] * 3, "three of the prompt's four chunks show nothing"
    assert len(steps) == 4 + 5, "a step for each forward"
    assert sum((chunk.tokens for chunk in chunks), ()) == llama.generate("hello there", max_tokens=6).tokens


def test_other_threads_run_while_the_model_computes(llama: Any) -> None:
    """With a switch interval of an hour, another thread gets on only where this one lets go of the interpreter."""
    decoder, counted, ready, stop = llama.backend.decoder(), [0], threading.Event(), threading.Event()

    def count() -> None:
        ready.set()
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0.0001)  # lets go

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    thread.start()
    try:
        ready.wait()
        sys.setswitchinterval(3600)
        before = counted[0]
        for _ in range(50):
            decoder.rewind(0)
            decoder.forward(np.zeros(200, np.int64), rows=1, rope_length=200)
        assert counted[0] > before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()


def test_sessions_are_freed_without_the_garbage_collector(llama: Any) -> None:
    gc.disable()
    try:
        session = llama.session()
        for _ in session.stream("hello", max_tokens=5):
            break
        session.generate("hello", max_tokens=5)
        alive = [weakref.ref(session), weakref.ref(session._sequence), weakref.ref(session._sequence._decoder)]
        session.close()
        del session
        assert [reference() for reference in alive] == [None] * 3
    finally:
        gc.enable()
