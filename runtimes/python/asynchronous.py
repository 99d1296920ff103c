"""Streams for asyncio: a thread computes, the event loop only receives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing
from typing import Generic, TypeVar

__all__ = ["iterate_in_thread"]

_T = TypeVar("_T")
MOST_WAITING = 16  # items computed ahead of a slow consumer


class _Worker(Generic[_T]):
    """A thread that runs an iterator and hands its items to an event loop, no more than a few ahead of the consumer."""

    def __init__(self, make: Callable[[], Generator[_T | None, None, None]]) -> None:
        self.items: asyncio.Queue[_T | BaseException | None] = asyncio.Queue()
        self.ended = asyncio.Event()
        self._loop, self._make = asyncio.get_running_loop(), make
        self._room = threading.Semaphore(MOST_WAITING)
        self._abandoned = False
        threading.Thread(target=self._run, name="edgekit-stream", daemon=True).start()

    def taken(self) -> None:
        """Make room for another item."""
        self._room.release()

    def abandon(self) -> None:
        """End after the forward that is being computed."""
        self._abandoned = True
        self._room.release()

    def _run(self) -> None:
        try:
            try:
                self._iterate()
            except BaseException as error:  # raised again where the items are awaited
                self._loop.call_soon_threadsafe(self.items.put_nowait, error)
            self._loop.call_soon_threadsafe(self.items.put_nowait, None)
            self._loop.call_soon_threadsafe(self.ended.set)
        except RuntimeError:  # the event loop was closed meanwhile: nobody waits any more
            return

    def _iterate(self) -> None:
        with closing(self._make()) as items:
            for item in items:
                if item is not None:
                    self._room.acquire()
                    self._loop.call_soon_threadsafe(self.items.put_nowait, item)
                if self._abandoned:
                    return


async def iterate_in_thread(make: Callable[[], Generator[_T | None, None, None]]) -> AsyncGenerator[_T, None]:
    """Yield what a generator yields, but None, that is made and run in a thread of its own.

    When the consumer leaves early, the generator is closed at the next thing it yields, be it None, and the thread is
    awaited, so that all it used is free again. That happens at once under `contextlib.aclosing` and where the task is
    cancelled as it waits for an item, else when the event loop gets to it.
    """
    worker = _Worker(make)
    try:
        while (item := await worker.items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            worker.taken()
            yield item
    finally:
        worker.abandon()
        await worker.ended.wait()
