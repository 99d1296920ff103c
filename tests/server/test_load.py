"""Many clients, slow ones, and those that go away: the slots are observed through /health."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from edgekit.runtimes.engine import LoadedModel

from .conftest import NEVER_ENDS, Running, Start, eventually

CHAT = "/v1/chat/completions"
MANY_BYTES = {"stream": True, "n": 100, "logprobs": True, "top_logprobs": 20}  # soon more than sockets hold
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
ENDLESS: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "logit_bias": NEVER_ENDS}


@contextmanager
def sent(running: Running, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection whose request was sent and whose answer is not read, with little room for it on the way."""
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        connection.sendall(head.encode() + data)
        yield connection


def test_fifty_clients_at_a_time_get_their_own_replies(start: Start, model: LoadedModel) -> None:
    prompts = [f"{number} is a number" for number in range(50)]
    expected = [model.generate(prompt, raw=True, max_tokens=8).text for prompt in prompts]

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = number % 2 == 0
        asked: Any = {"model": "tiny", "prompt": prompts[number], "max_tokens": 8, "stream": stream}
        reply = await client.completions.create(**asked)
        return "".join([chunk.choices[0].text async for chunk in reply]) if stream else reply.choices[0].text

    async def run(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return list(await asyncio.gather(*(one(client, number) for number in range(50))))

    with start(slots=3) as running:
        assert asyncio.run(run(running.url)) == expected
        assert (running.health()["active"], running.health()["open"]) == (0, 0)


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_away_frees_its_slot(start: Start, stream: bool) -> None:
    with start(slots=1) as running:
        with sent(running, ENDLESS | {"stream": stream, "n": 100}) as connection:
            eventually(lambda: running.health()["active"] == 1)
            if stream:
                assert connection.recv(10)
        eventually(lambda: running.health()["open"] == running.health()["active"] == 0)
        with running.client() as client:
            assert client.completions.create(model="tiny", prompt="Hi", max_tokens=1).choices


def test_client_that_goes_away_leaves_the_queue(start: Start) -> None:
    with start(slots=1, grace_s=0) as running, sent(running, ENDLESS | {"n": 100}):
        eventually(lambda: running.health()["active"] == 1)
        with sent(running, ENDLESS), sent(running, ENDLESS | {"stream": True}):
            eventually(lambda: running.health()["waiting"] == 2)
        eventually(lambda: running.health()["waiting"] == 0)
        assert running.health()["active"] == 1


def test_slow_readers_do_not_hold_others_up(start: Start) -> None:
    slow = ENDLESS | MANY_BYTES
    with start(slots=2, buffer_bytes=10_000, grace_s=0) as running:
        with sent(running, slow) as connection:
            connection.recv(10)
            with running.client() as client:
                for _ in range(5):
                    reply = client.completions.create(model="tiny", prompt="Hi", max_tokens=20)
                    assert reply.usage is not None
                    assert reply.usage.completion_tokens <= 20
            assert running.health()["active"] == 1
        eventually(lambda: running.health()["active"] == 0)


def test_reader_that_stalls_loses_its_slot(start: Start) -> None:
    slow = ENDLESS | MANY_BYTES
    with start(slots=1, buffer_bytes=10_000, stall_s=0.5) as running, sent(running, slow) as connection:
        connection.recv(10)
        with running.client() as client:
            assert client.completions.create(model="tiny", prompt="Hi", max_tokens=1).choices
        assert running.health()["open"] == 0


def test_requests_share_the_model_in_turns(start: Start) -> None:
    """A short request ends while a long one, begun before, still runs."""
    with start(slots=2, grace_s=0) as running, sent(running, ENDLESS | {"n": 100}):
        eventually(lambda: running.health()["active"] == 1)
        with running.client() as client:
            assert client.completions.create(model="tiny", prompt="Hi", max_tokens=4).choices
        assert running.health()["active"] == 1


@pytest.mark.parametrize("stream", [True, False])
def test_time_limit_ends_a_request(start: Start, stream: bool) -> None:
    with start(timeout_s=0.3) as running, running.client() as client:
        with pytest.raises(openai.APIError) as caught:
            list(client.chat.completions.create(**ENDLESS, n=100, stream=stream))
        assert caught.value.code == "timeout"
        eventually(lambda: running.health()["active"] == 0)


def test_waiting_counts_into_the_time_limit(start: Start) -> None:
    with start(slots=1, timeout_s=1) as running, sent(running, ENDLESS | {"n": 100}):
        eventually(lambda: running.health()["active"] == 1)
        with running.client() as client, pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**ENDLESS, n=100)
        assert caught.value.status_code == 504
