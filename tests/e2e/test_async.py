"""Streams for asyncio: the same chunks, a loop that never waits for the model, and an end as soon as nobody listens."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing
from typing import Any

import pytest

import edgekit
from edgekit.runtimes.asynchronous import MOST_WAITING
from edgekit.runtimes.backend_onnxruntime import OnnxRuntimeDecoder


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The thread of each forward since the test began."""
    threads: list[threading.Thread] = []
    forward = OnnxRuntimeDecoder.forward

    def counted(self: OnnxRuntimeDecoder, *arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(OnnxRuntimeDecoder, "forward", counted)
    return threads


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "edgekit-stream"]


async def threads_ended() -> None:
    """Returns once no thread runs a stream."""
    for thread in stream_threads():
        await asyncio.to_thread(thread.join)


@pytest.mark.parametrize("of", ["model", "session"])
def test_chunks_are_those_of_stream(of: str, llama: Any, forwards: list[threading.Thread]) -> None:
    source = llama if of == "model" else llama.session()

    async def collect() -> list[edgekit.Chunk]:
        return [chunk async for chunk in source.astream("hello", max_tokens=40)]

    chunks = asyncio.run(collect())
    assert threading.main_thread() not in forwards
    reply = llama.generate("hello", max_tokens=40)
    assert sum((chunk.tokens for chunk in chunks), ()) == reply.tokens
    assert "".join(chunk.text for chunk in chunks) == reply.text
    assert chunks[-1].finish_reason == reply.finish_reason


def test_the_loop_goes_on_while_the_model_computes(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward waits for the loop: were the loop to wait for the forward, neither would end."""
    looped, forward = threading.Event(), OnnxRuntimeDecoder.forward

    def waiting(self: OnnxRuntimeDecoder, *arguments: Any, **options: Any) -> Any:
        assert looped.wait(60)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(OnnxRuntimeDecoder, "forward", waiting)

    async def both() -> int:
        async def collect() -> int:
            return len([chunk async for chunk in llama.astream("hello", max_tokens=4)])

        task = asyncio.create_task(collect())
        await asyncio.sleep(0)
        looped.set()
        return await task

    assert asyncio.run(both())


def test_errors_reach_the_loop(llama: Any) -> None:
    async def ask() -> None:
        async for _ in llama.astream("x" * 1000):
            pass

    with pytest.raises(edgekit.GenerationError, match="too many"):
        asyncio.run(ask())


def test_leaving_the_loop_frees_the_session(llama: Any, forwards: list[threading.Thread]) -> None:
    async def leave() -> tuple[int, tuple[int, ...]]:
        session = llama.session()
        async with aclosing(session.astream("hello", max_tokens=200)) as chunks:
            async for _ in chunks:
                break
        count = len(forwards)
        return count, session.generate("hello", max_tokens=5).tokens

    count, tokens = asyncio.run(leave())
    assert count < 150
    assert tokens == llama.generate("hello", max_tokens=5).tokens


def test_cancelled_task_ends_the_reply(llama: Any, forwards: list[threading.Thread]) -> None:
    async def cancel() -> None:
        began = asyncio.Event()

        async def collect() -> None:
            async for _ in llama.astream("hello", max_tokens=200):
                began.set()
                await asyncio.sleep(3600)

        task = asyncio.create_task(collect())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await threads_ended()

    asyncio.run(asyncio.wait_for(cancel(), 60))
    assert len(forwards) < 200


def test_cancelled_during_a_long_prompt(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.runtimes.sequence.PREFILL_CHUNK", 2)
    begun, go, count, forward = threading.Event(), threading.Event(), [0], OnnxRuntimeDecoder.forward

    def waiting(self: OnnxRuntimeDecoder, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        begun.set()
        assert go.wait(60)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(OnnxRuntimeDecoder, "forward", waiting)

    async def cancel() -> None:
        async def collect() -> None:
            async for _ in llama.astream("x" * 200, max_tokens=5):
                raise AssertionError("nothing was to be shown")

        task = asyncio.create_task(collect())
        await asyncio.to_thread(begun.wait)
        task.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert count[0] <= 2


def test_slow_reader_bounds_what_is_computed_ahead(llama: Any, forwards: list[threading.Thread]) -> None:
    async def read() -> None:
        async with aclosing(llama.astream("hello", max_tokens=200, speculate=False)) as chunks:
            async for _ in chunks:
                await asyncio.sleep(0.5)  # for the thread to run ahead as far as it may
                break
            shown = MOST_WAITING + 2
            assert sum(1 for thread in forwards) <= 8 * shown

    asyncio.run(read())


def test_many_streams_at_once(llama: Any) -> None:
    prompts = [f"prompt {number}" for number in range(6)]
    expected = [llama.generate(prompt, max_tokens=12).tokens for prompt in prompts]

    async def collect(prompt: str) -> tuple[int, ...]:
        return sum([chunk.tokens async for chunk in llama.astream(prompt, max_tokens=12)], ())

    async def all_of_them() -> list[tuple[int, ...]]:
        return list(await asyncio.gather(*map(collect, prompts)))

    assert asyncio.run(all_of_them()) == expected


def test_session_in_use_is_an_error_in_the_loop_too(llama: Any) -> None:
    async def twice() -> None:
        session = llama.session()
        async with aclosing(session.astream("hello", max_tokens=400)) as chunks:
            async for _ in chunks:
                with pytest.raises(edgekit.GenerationError, match="in use"):
                    async for _ in session.astream("other"):
                        pass
                break

    asyncio.run(twice())


def test_closed_loop_ends_the_thread(llama: Any) -> None:
    async def start() -> Any:
        chunks = llama.astream("hello", max_tokens=200)
        await anext(chunks)
        return chunks

    loop = asyncio.new_event_loop()
    chunks = loop.run_until_complete(start())
    threads = stream_threads()
    assert threads
    loop.run_until_complete(chunks.aclose())
    loop.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
