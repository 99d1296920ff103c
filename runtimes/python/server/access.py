"""Who may call, and how much: the door that every request passes before it is read."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import uuid
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_error import ApiError
from .settings import Settings

__all__ = ["Door", "is_loopback"]

_OPEN_PATHS = ("/health",)  # a probe has no key


class Door:
    """ASGI middleware: checks host, origin and key, receives the body within its limits, and ends what nobody waits for.

    A web page can send requests to a loopback address, directly or after its own name was made to point there (DNS rebinding).
    The first kind says so in `Origin`, the second in `Host`: both are refused unless allowed.

    When the client goes away, the application's task is cancelled, whatever it waits for.

    Args:
        count: Told the path and the end of each request: its status, or "gone".
    """

    def __init__(self, app: ASGIApp, settings: Settings, count: Callable[[str, str], None]) -> None:
        self._app = app
        self._settings = settings
        self._count = count
        self._open = 0
        self.stopping = False

    @property
    def open(self) -> int:
        """Requests with a body that are in the house."""
        return self._open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        reply = _Reply(send)
        try:
            headers = Headers(scope=scope)
            self._check_caller(scope["path"], headers)
            if scope["method"] == "POST":
                await self._serve_body(scope, headers, receive, reply)
            else:
                await self._app(scope, receive, reply.send)
        except ApiError as error:
            await error.response()(scope, receive, reply.send)
        finally:
            self._count(scope["path"], str(reply.status) if reply.complete else "gone")

    def _check_caller(self, path: str, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_allowed_host(host):
            raise ApiError(
                403,
                f"the host {host!r} is not one of this server's names: allow it with --allow-host",
                code="host_not_allowed",
            )
        if origin is not None and origin not in self._settings.origins:
            raise ApiError(
                403,
                f"web pages of {origin!r} may not call this server: allow them with --allow-origin",
                code="origin_not_allowed",
            )
        if self._settings.api_key is not None and path not in _OPEN_PATHS:
            self._check_key(headers.get("authorization", ""), self._settings.api_key)

    def _is_allowed_host(self, host: str) -> bool:
        """Names only: a page that reached us through a rebound name sends that name, never an address."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.lower().rstrip(".")
        if name in ("localhost", *map(str.lower, self._settings.hosts)):
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True

    def _check_key(self, authorization: str, key: str) -> None:
        scheme, _, given = authorization.partition(" ")
        matches = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
        if not matches or scheme.lower() != "bearer":
            raise ApiError(
                401,
                "a valid API key is needed, as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _serve_body(self, scope: Scope, headers: Headers, receive: Receive, reply: _Reply) -> None:
        if self.stopping:
            raise ApiError(503, "the server is stopping", code="stopping", headers={"Connection": "close"})
        if self._open >= self._settings.places:
            message = "as many requests are open as this server takes: try again later"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1", "Connection": "close"})
        self._open += 1
        try:
            body = await self._receive_body(headers, receive)
            if body is not None:
                await _unless_gone(receive, reply, lambda later: self._app(scope, _replay(body, later), reply.send))
        finally:
            self._open -= 1

    async def _receive_body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body; None where the client went away."""
        most, body = self._settings.max_body_bytes, bytearray()
        closing = {"Connection": "close"}
        too_large = ApiError(413, f"the body is larger than {most:,} bytes", code="request_too_large", headers=closing)
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:  # it came without a length
                        raise too_large
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(408, "the body did not arrive in time", code="timeout", headers=closing) from error


class _Reply:
    """The `send` of one request: notes what was sent, and gives the response an id."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = f"req_{uuid.uuid4().hex}"
        await self._send(message)
        self.complete = message["type"] == "http.response.body" and not message.get("more_body")


def _replay(body: bytes, later: Receive) -> Receive:
    pending = [body]

    async def receive() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await later()

    return receive


async def _unless_gone(receive: Receive, reply: _Reply, call: Callable[[Receive], Awaitable[None]]) -> None:
    """Run the application, but cancel it once the client has gone away."""
    gone = asyncio.Event()

    async def later() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    serving, watching = asyncio.ensure_future(call(later)), asyncio.ensure_future(watch())
    try:
        await asyncio.wait((serving, watching), return_when=asyncio.FIRST_COMPLETED)
        gone.set()
        if not serving.done() and not reply.complete:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
        else:
            await serving
    finally:
        for task in (serving, watching):
            task.cancel()


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    return ipaddress.ip_address(address).is_loopback
