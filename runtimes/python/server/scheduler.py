"""One thread that computes, for many requests in turns."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["Job", "Scheduler", "StoppedError"]

_logger = logging.getLogger(__name__)
_Event = TypeVar("_Event")


class StoppedError(Exception):
    """The scheduler was closed before the job was done."""


class Scheduler(Generic[_Event]):
    """Advances the iterators of its jobs on one thread, a step of each in turn: requests share the model forward by forward.

    Invariants:
        - Only the compute thread starts, advances and closes iterators.
        - At most `slots` iterators exist at a time. Other jobs wait in the order of their arrival.
        - A cancelled job is closed before any other job takes its next step, and holds its slot no longer.
        - A job whose reader is `buffer_bytes` behind takes no steps until it is read again.

    Args:
        slots: Jobs that run at a time.
        buffer_bytes: Of a job's events that were not read yet.
        weigh: Bytes that an event takes, about.
    """

    def __init__(self, slots: int, *, buffer_bytes: int, weigh: Callable[[_Event], int]) -> None:
        self._slots = slots
        self._buffer_bytes = buffer_bytes
        self._weigh = weigh
        self._changed = threading.Condition()
        self._waiting: deque[Job[_Event]] = deque()
        self._active: deque[Job[_Event]] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="edgekit-compute", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Jobs that hold a slot."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Jobs that wait for one."""
        return len(self._waiting)

    def submit(self, start: Callable[[], Iterator[_Event | None]]) -> Job[_Event]:
        """Queue a job; call it from the event loop that will read it.

        Args:
            start: Makes the iterator, on the compute thread. A step that yields None has nothing to show.

        Raises:
            StoppedError: The scheduler is closed.
        """
        job: Job[_Event] = Job(self, start)
        with self._changed:
            if self._closed:
                raise StoppedError("the server is stopping")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """End all jobs with StoppedError, and the thread."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *self._active):
                job._cancelled, job._error = True, StoppedError("the server is stopping")
            while self._waiting:
                self._waiting.popleft()._end()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._step(job)

    def _next(self) -> Job[_Event] | None:
        """The job whose turn it is; None once the scheduler is closed and empty."""
        with self._changed:
            while True:
                while self._waiting and len(self._active) < self._slots:
                    self._active.append(self._waiting.popleft())
                for job in self._active:
                    if job._cancelled:
                        return job
                for _ in range(len(self._active)):
                    job = self._active[0]
                    self._active.rotate(-1)
                    if job._weight < self._buffer_bytes:
                        return job
                if self._closed and not self._active:
                    return None
                self._changed.wait()

    def _step(self, job: Job[_Event]) -> None:
        error: Exception | None = None
        try:
            if not job._cancelled:
                job._iterator = job._iterator or job._start()
                event = next(job._iterator)
                if event is not None:
                    with self._changed:
                        job._put(event, self._weigh(event))
                return
        except StopIteration:
            pass
        except Exception as failure:  # whatever it is, it is this job's alone
            error = failure
        self._retire(job, error)

    def _retire(self, job: Job[_Event], error: Exception | None) -> None:
        close = getattr(job._iterator, "close", None)
        if close is not None:
            try:
                close()
            except Exception:
                _logger.exception("a job did not close")
        job._iterator = None  # and the session that it holds
        with self._changed:
            self._active.remove(job)
            job._error = job._error or error
            job._end()

    def _cancel(self, job: Job[_Event]) -> None:
        with self._changed:
            job._cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                job._end()
            self._changed.notify()


class Job(Generic[_Event]):
    """What was submitted, seen from the event loop. As a context manager, it is cancelled when it is left."""

    def __init__(self, scheduler: Scheduler[_Event], start: Callable[[], Iterator[_Event | None]]) -> None:
        self._scheduler = scheduler
        self._start = start
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        # Below: guarded by the scheduler's condition.
        self._iterator: Iterator[_Event | None] | None = None
        self._events: list[_Event] = []
        self._weight = 0
        self._cancelled = False
        self._ended = False
        self._error: Exception | None = None

    async def take(self) -> list[_Event]:
        """The events since the last call, at least one; empty when there will be no more.

        Raises:
            Exception: What the iterator raised, after its last events; StoppedError where the scheduler was closed.
        """
        while True:
            with self._scheduler._changed:
                events, self._events = self._events, []
                self._weight = 0
                self._ready.clear()
                if events:
                    self._scheduler._changed.notify()  # it may have waited for this
                    return events
                if self._ended:
                    if self._error is not None:
                        raise self._error
                    return []
            await self._ready.wait()

    def cancel(self) -> None:
        """End the job after the step it is in."""
        self._scheduler._cancel(self)

    def __enter__(self) -> Job[_Event]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _put(self, event: _Event, weight: int) -> None:
        self._events.append(event)
        self._weight += weight
        self._wake()

    def _end(self) -> None:
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._ready.set)
