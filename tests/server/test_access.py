"""The door: hosts, origins, keys, sizes, malformed requests, and how many at a time."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import openai
import pytest

from .conftest import NEVER_ENDS, Running, Start, eventually

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def ask(
    running: Running, path: str = "/v1/models", body: bytes | None = None, **headers: str
) -> tuple[int, Any, http.client.HTTPMessage]:
    """Status, JSON and headers of an answer."""
    with closing(http.client.HTTPConnection("127.0.0.1", running.port)) as connection:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST" if body is not None else "GET", path, body, names)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers


@contextmanager
def raw(running: Running, data: bytes) -> Iterator[socket.socket]:
    """A connection on which some bytes were sent."""
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.sendall(data)
        yield connection


def answer_to(running: Running, data: bytes) -> bytes:
    """All that comes back on a connection that the server closes."""
    with raw(running, data) as connection:
        received = b""
        while more := connection.recv(65536):
            received += more
        return received


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:8080", "192.168.0.7:1234", "localhost."]
)
def test_own_names_and_addresses_are_let_in(running: Running, host: str) -> None:
    assert ask(running, host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", ""]
)
def test_other_names_are_refused(running: Running, host: str) -> None:
    status, body, _ = ask(running, host=host)
    assert (status, body["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000"])
def test_web_pages_are_refused(running: Running, origin: str) -> None:
    status, body, headers = ask(running, CHAT, json.dumps(BODY).encode(), origin=origin)
    assert (status, body["error"]["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in headers


def test_hosts_and_origins_can_be_allowed(start: Start) -> None:
    page = "http://localhost:3000"
    with start(hosts=("box.lan",), origins=(page,)) as running:
        status, _, headers = ask(running, host="box.lan:8080", origin=page)
        assert (status, headers["access-control-allow-origin"]) == (200, page)
        assert ask(running, origin="http://localhost:3001")[0] == 403


def test_key_is_needed_but_for_health(start: Start) -> None:
    with start(api_key="secret-é") as running:
        for key in ("wrong", "", "secret-"):
            with running.client(api_key=key or "x") as client, pytest.raises(openai.AuthenticationError) as caught:
                client.models.list()
            assert caught.value.code == "invalid_api_key"
        assert ask(running)[0] == ask(running, "/metrics")[0] == 401
        assert ask(running, authorization="Basic secret-é".encode().decode("latin-1"))[0] == 401
        assert ask(running, authorization="Bearer secret-é".encode().decode("latin-1"))[0] == 200
        assert ask(running, "/health")[0] == 200


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b"[1]", "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (b"[" * 100_000, "invalid_json", None),
        (b'{"model": "tiny", "temperature": NaN}', "invalid_json", None),
        (b"{}", "missing_required_parameter", "model"),
        (b'{"model": "tiny", "messages": []}', "invalid_value", "messages"),
        (b'{"model": "tiny", "messages": "hi"}', "invalid_type", "messages"),
        (b'{"model": "tiny", "messages": [{"role": "king", "content": "hi"}]}', "invalid_value", "messages[0]"),
        (b'{"model": "tiny", "messages": [{"role": "user"}]}', "missing_required_parameter", "messages[0].content"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": 1}]}', "invalid_type", "messages[0].content"),
        (
            b'{"model": "tiny", "messages": [{"role": "assistant"}]}',
            "missing_required_parameter",
            "messages[0].content",
        ),
    ],
)
def test_malformed_bodies_are_told_apart(running: Running, body: bytes, code: str, param: str | None) -> None:
    status, answer, _ = ask(running, CHAT, body)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, code, param)
    assert answer["error"]["type"] == "invalid_request_error"


def test_surrogates_in_a_message_are_refused_or_served(running: Running) -> None:
    body = json.dumps(BODY | {"messages": [{"role": "user", "content": "\ud800"}]}).encode()
    assert ask(running, CHAT, body)[0] == 400


def test_unknown_paths_and_methods(running: Running) -> None:
    status, body, _ = ask(running, "/v1/embeddings", b"{}")
    assert (status, body["error"]["code"]) == (404, "unknown_path")
    assert ask(running, CHAT)[0] == 405


def test_large_bodies_are_refused(start: Start) -> None:
    with start(max_body_bytes=1000) as running:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()
        with_length = head + b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n"
        chunked = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1f4\r\n" + b"x" * 500 + b"\r\n"
        assert answer_to(running, with_length).startswith(b"HTTP/1.1 413")
        assert b"request_too_large" in answer_to(running, chunked + b"1f5\r\n" + b"x" * 501 + b"\r\n")
        eventually(lambda: running.health()["open"] == 0)
        assert ask(running, CHAT, json.dumps(BODY).encode())[0] == 200


def test_slow_bodies_and_heads_are_ended(start: Start) -> None:
    with start(body_timeout_s=0.2, stall_s=0.5) as running:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()
        assert answer_to(running, head + b"Content-Length: 100\r\n\r\nxx").startswith(b"HTTP/1.1 408")
        for started in (b"", head):
            with suppress(ConnectionResetError):  # as good as a close
                assert answer_to(running, started) == b""


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_not_http_leaves_the_server_unharmed(running: Running, data: bytes) -> None:
    with raw(running, data) as connection:
        connection.settimeout(60)
        with suppress(ConnectionResetError):
            assert connection.recv(20).startswith((b"HTTP/1.1 4", b""))
    assert ask(running)[0] == 200


def test_more_requests_than_places_are_told_to_come_later(start: Start) -> None:
    body = json.dumps(BODY | {"max_tokens": None, "n": 100, "logit_bias": NEVER_ENDS, "stream": True}).encode()
    request = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with start(slots=1, max_queue=1, grace_s=0) as running, raw(running, request), raw(running, request):
        eventually(lambda: running.health()["open"] == 2)
        status, answer, headers = ask(running, CHAT, json.dumps(BODY).encode())
        assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "queue_full", "1")
        with running.client() as client, pytest.raises(openai.RateLimitError):
            client.responses.create(model="tiny", input="Hi")


def test_metrics_count_requests_and_tokens(start: Start) -> None:
    with start() as running, running.client() as client:
        for _ in range(3):
            client.chat.completions.create(**BODY)
        with closing(http.client.HTTPConnection("127.0.0.1", running.port)) as connection:
            connection.request("GET", "/metrics")
            page = connection.getresponse().read().decode()
    assert f'edgekit_requests_total{{path="{CHAT}",status="200"}} 3.0' in page
    assert 'edgekit_tokens_total{kind="generated",model="tiny"} 6.0' in page
    assert "edgekit_requests_active 0.0" in page
    assert 'edgekit_request_seconds_count{model="tiny"} 3.0' in page
