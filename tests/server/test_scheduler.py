"""The scheduler alone: turns, slots, cancelling, slow readers, errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.runtimes.server.scheduler import Job, Scheduler, StoppedError


@contextmanager
def scheduling(slots: int, buffer: int = 1000) -> Iterator[Scheduler[str]]:
    scheduler = Scheduler[str](slots, buffer_bytes=buffer, weigh=len)
    try:
        yield scheduler
    finally:
        scheduler.close()


async def read(job: Job[str]) -> list[str]:
    events: list[str] = []
    while more := await job.take():
        events += more
    return events


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_so():
            await asyncio.sleep(0.001)


def test_jobs_take_turns_and_later_ones_wait() -> None:
    order: list[str] = []
    begin = threading.Event()

    def steps(name: str, count: int) -> Iterator[str | None]:
        begin.wait()
        for index in range(count):
            order.append(name)
            yield f"{name}{index}" if index % 2 else None

    async def run() -> list[list[str]]:
        with scheduling(slots=2) as scheduler:
            jobs = [scheduler.submit(lambda name=name: steps(name, 4)) for name in "abc"]  # type: ignore[misc]
            begin.set()
            return [await read(job) for job in jobs]

    assert asyncio.run(run()) == [["a1", "a3"], ["b1", "b3"], ["c1", "c3"]]
    # The first may take steps before the others are there; `c` has no slot before another is done.
    text = "".join(order).lstrip("a")
    assert text.startswith("ba" * min(3, text.count("a")))
    assert text.index("c") > text.rindex("a")


@given(
    st.lists(st.lists(st.none() | st.text(min_size=1, max_size=3), max_size=8), max_size=6),
    st.integers(1, 3),
    st.integers(1, 6),
)
@settings(deadline=None, max_examples=40)
def test_every_job_gives_all_its_events_in_order(plans: list[list[str | None]], slots: int, buffer: int) -> None:
    most = 0

    def steps(plan: list[str | None], scheduler: Scheduler[str]) -> Iterator[str | None]:
        nonlocal most
        most = max(most, scheduler.active)
        yield from plan

    async def run() -> list[list[str]]:
        with scheduling(slots, buffer) as scheduler:
            jobs = [scheduler.submit(lambda plan=plan: steps(plan, scheduler)) for plan in plans]  # type: ignore[misc]
            found = await asyncio.gather(*(read(job) for job in jobs))
            assert (scheduler.active, scheduler.waiting) == (0, 0)
            return found

    assert asyncio.run(run()) == [[event for event in plan if event is not None] for plan in plans]
    assert most <= slots


def test_cancelled_jobs_close_and_free_their_slots() -> None:
    closed: list[str] = []

    def endless(name: str) -> Iterator[str | None]:
        try:
            while True:
                yield None
        finally:
            closed.append(name)

    async def run() -> None:
        with scheduling(slots=1) as scheduler:
            first, second = scheduler.submit(lambda: endless("first")), scheduler.submit(lambda: endless("second"))
            await until(lambda: scheduler.active == 1)
            second.cancel()  # while it waits: never begun
            assert scheduler.waiting == 0
            third = scheduler.submit(lambda: iter(["third"]))
            first.cancel()
            assert await read(third) == ["third"]
            assert closed == ["first"]
            assert await read(first) == []
            assert await read(second) == []

    asyncio.run(run())


def test_unread_job_pauses_and_others_go_on() -> None:
    made = 0

    def loud() -> Iterator[str | None]:
        nonlocal made
        for _ in range(100):
            made += 1
            yield "x" * 10

    async def run() -> None:
        with scheduling(slots=2, buffer=50) as scheduler:
            slow = scheduler.submit(loud)
            await until(lambda: made == 5)
            assert await read(scheduler.submit(lambda: iter(["a", "b"]))) == ["a", "b"]
            assert made == 5
            assert len(await slow.take()) == 5
            assert len(await read(slow)) == 95

    asyncio.run(run())


def test_error_ends_its_own_job_only() -> None:
    def failing() -> Iterator[str | None]:
        yield "before"
        raise ValueError("it broke")

    async def run() -> None:
        with scheduling(slots=2) as scheduler:
            failed, fine = scheduler.submit(failing), scheduler.submit(lambda: iter(["fine"]))
            with pytest.raises(ValueError, match="it broke"):
                await read(failed)
            assert await read(fine) == ["fine"]

    asyncio.run(run())


def test_closing_ends_everything() -> None:
    def endless() -> Iterator[str | None]:
        while True:
            yield None

    async def run() -> None:
        with scheduling(slots=1) as scheduler:
            jobs = [scheduler.submit(endless) for _ in range(3)]
            await asyncio.to_thread(scheduler.close)
            for job in jobs:
                with pytest.raises(StoppedError):
                    await job.take()
            with pytest.raises(StoppedError):
                scheduler.submit(endless)

    asyncio.run(run())
