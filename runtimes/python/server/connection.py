"""HTTP connections that do not wait for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["connection_class"]


def connection_class(stall_s: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which closes a connection that stalls for so many seconds."""
    return type("Connection", (_Connection,), {"stall_s": stall_s})


class _Connection(H11Protocol):
    """Closes a connection whose client reads nothing while a reply piles up, or sends a part of a request's head and no more.

    uvicorn itself limits only the time between two requests.
    """

    stall_s: float
    _unread: asyncio.TimerHandle | None = None
    _headless: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # asyncio gives no other
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._unread, self._headless):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.stall_s, self._abort)

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
        super().resume_writing()

    def _await_head(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if self._headless is not None and not waits:
            self._headless.cancel()
            self._headless = None
        elif self._headless is None and waits:
            self._headless = self.loop.call_later(self.stall_s, self._abort)

    def _abort(self) -> None:
        transport: Any = self.transport
        transport.abort()
