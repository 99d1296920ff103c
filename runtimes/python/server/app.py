"""The ASGI application: routes, and the way of a request from its body to its reply."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edgekit.errors import EdgeKitError

from .access import Door
from .api_error import ApiError, from_edgekit
from .chat import ChatCompletions
from .completions import Completions
from .endpoint import Answer, Endpoint
from .json_text import to_json
from .metrics import Metrics
from .models import Piece, ServedModel, Work, find_model, steps_of, weigh
from .responses import Responses
from .scheduler import Scheduler, StoppedError
from .schemas import parse
from .settings import Settings

__all__ = ["Service"]

_logger = logging.getLogger(__name__)
_ENDPOINTS: tuple[type[Endpoint], ...] = (ChatCompletions, Completions, Responses)
_LISTS = ("/v1/models", "/health", "/metrics")
_POLL_S = 0.05


class Service:
    """Models, and the application that serves them.

    Args:
        models: By name.
    """

    def __init__(self, models: Mapping[str, ServedModel], settings: Settings) -> None:
        self._models = models
        self._settings = settings
        self._scheduler = Scheduler[Piece](settings.slots, buffer_bytes=settings.buffer_bytes, weigh=weigh)
        self._metrics = Metrics(self._scheduler)
        self._door = Door(self._routes(), settings, self._count)
        self.app: ASGIApp = self._door
        if settings.origins:
            self.app = CORSMiddleware(
                self._door,
                allow_origins=settings.origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=("x-request-id",),
            )

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests, give the running ones some seconds to finish, then end them with an error."""
        self._door.stopping = True
        deadline = time.monotonic() + grace_s
        while self._door.open and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        await asyncio.to_thread(self._scheduler.close)

    def close(self) -> None:
        """End all requests and the compute thread."""
        self._scheduler.close()

    def _routes(self) -> Starlette:
        async def failed(request: Request, error: Exception) -> Response:
            return _as_api_error(error).response()

        return Starlette(
            routes=[
                *(Route(endpoint.path, partial(self._respond, endpoint), methods=["POST"]) for endpoint in _ENDPOINTS),
                Route("/v1/models", self._list_models),
                Route("/v1/models/{name}", self._show_model),
                Route("/health", self._health),
                Route("/metrics", self._show_metrics),
            ],
            exception_handlers={ApiError: failed, HTTPException: failed, Exception: failed},
        )

    def _count(self, path: str, status: str) -> None:
        known = path in _LISTS or any(endpoint.path == path for endpoint in _ENDPOINTS)
        self._metrics.count(path if known else "other", status)

    async def _list_models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [model.describe() for model in self._models.values()]})

    async def _show_model(self, request: Request) -> Response:
        return _json(find_model(self._models, request.path_params["name"]).describe())

    async def _health(self, request: Request) -> Response:
        status = "stopping" if self._door.stopping else "ok"
        body = {
            "status": status,
            "models": list(self._models),
            "slots": self._settings.slots,
            "active": self._scheduler.active,
            "waiting": self._scheduler.waiting,
            "open": self._door.open,
        }
        return Response(to_json(body), 200 if status == "ok" else 503, media_type="application/json")

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=self._metrics.content_type)

    async def _respond(self, endpoint: type[Endpoint], request: Request) -> Response:
        body = parse(endpoint.schema, await request.body(), endpoint.unsupported)
        work = endpoint.work(body, find_model(self._models, body.model), self._settings.temperature)
        frames = self._stream(work, endpoint.answer(body, work))
        if body.stream:
            first = await anext(frames)  # what is wrong with a request shows now, while it can be told by a status
            return _EventStream(first, frames)
        return _json(await self._whole(work, endpoint.answer(body, work)))

    async def _generate(self, work: Work, answer: Answer) -> AsyncGenerator[list[Piece], None]:
        """The pieces of a request as they come, within its time. Leaving the loop frees its slot.

        Raises:
            ApiError: The request can't be served, takes too long or too much memory, or the server stops.
        """
        started = asyncio.get_running_loop().time()
        try:
            with self._scheduler.submit(partial(steps_of, work)) as job:
                first, kept = True, 0
                while True:
                    async with asyncio.timeout_at(started + self._settings.timeout_s):
                        pieces = await job.take()
                    if not pieces:
                        return
                    if first:
                        self._metrics.first(work, asyncio.get_running_loop().time() - started)
                        first = False
                    kept += sum(map(weigh, pieces)) if answer.keeps else 0
                    if kept > self._settings.max_reply_bytes:
                        raise _too_large(self._settings.max_reply_bytes)
                    yield pieces
        except (EdgeKitError, StoppedError, TimeoutError) as error:
            raise _as_api_error(error, self._settings) from error

    async def _whole(self, work: Work, answer: Answer) -> dict[str, Any]:
        started = time.monotonic()
        async with aclosing(self._generate(work, answer)) as batches:
            async for batch in batches:
                for piece in batch:
                    _exhaust(answer.add(piece))
        _exhaust(answer.end())
        self._metrics.done(work, answer.usage, time.monotonic() - started)
        return answer.whole()

    async def _stream(self, work: Work, answer: Answer) -> AsyncGenerator[bytes, None]:
        """The frames of a reply. What goes wrong before the first is raised, what comes later is told in a frame."""
        started, begun = time.monotonic(), False
        try:
            async with aclosing(self._generate(work, answer)) as batches:
                async for batch in batches:
                    opening = () if begun else answer.begin()
                    begun = True
                    yield b"".join([*opening, *(frame for piece in batch for frame in answer.add(piece))])
        except Exception as error:
            if not begun:
                raise
            if not isinstance(error, ApiError):
                _logger.exception("a reply failed")
            yield b"".join(answer.fail(_as_api_error(error)))
            return
        yield b"".join(answer.end())
        self._metrics.done(work, answer.usage, time.monotonic() - started)


def _exhaust(frames: Iterable[bytes]) -> None:
    """Let an answer take in what its frames would tell."""
    for _ in frames:
        pass


def _json(body: object) -> Response:
    return Response(to_json(body), media_type="application/json")


def _too_large(limit: int) -> ApiError:
    message = (
        f"the response takes over {limit:,} bytes: stream it, or ask for fewer tokens, replies or log-probabilities"
    )
    return ApiError(400, message, code="response_too_large")


def _as_api_error(error: Exception, settings: Settings | None = None) -> ApiError:
    match error:
        case ApiError():
            return error
        case HTTPException(status_code=404):
            return ApiError(404, "there is nothing at this path", code="unknown_path")
        case HTTPException():
            return ApiError(error.status_code, error.detail, code="bad_request", headers=error.headers)
        case StoppedError():
            return ApiError(503, "the server is stopping", code="stopping")
        case TimeoutError():
            limit = settings.timeout_s if settings else 0
            headers = {"x-should-retry": "false"}  # it would take as long again
            return ApiError(504, f"the request took over {limit:g} seconds", code="timeout", headers=headers)
        case EdgeKitError():
            return from_edgekit(error, status=500)
    return ApiError(500, "the server failed; its log says how", code="internal_error")


class _EventStream(Response):
    """Server-sent events, each sent when the client has taken those before."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, frames: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._frames = first, frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._frames) as frames:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for data in frames:
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
